"""`seqmix inspect`: show how a trained model processes a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ...lab.figures.writer import content_of, require_drawable
from ...lab.inspect.report import render, sections_of
from ...lab.inspect.views import look
from ...registry import DataError, SeqmixError, read_bytes, write_files
from ...training import load_run
from ..console import note
from ..options import Checkpoint, Device, Run, Trust, checkpoint_choice, require_device, require_writable
from ..output import visible
from .plot import select_figures


@dataclass(frozen=True)
class InspectResult:
    """Result of `seqmix inspect`."""

    out: str
    """The page or image that was written."""
    tokens: int
    """Number of tokens of the text that were read."""
    layers: list[dict[str, Any]]
    """Measurements of each layer: the fields of `seqmix.lab.inspect.views.LayerView`, without the maps."""


def inspect(
    run: Run,
    text: Annotated[Path, typer.Option(help="Text file for the model to read.", metavar="FILE")],
    tokens: Annotated[int, typer.Option(help="Number of tokens to read, from the start of the text.", min=2)] = 256,
    out: Annotated[
        Path, typer.Option(help="Output file: a page (.html) or an image (.pdf, .svg, .png).", metavar="FILE")
    ] = Path("inspect.html"),
    figure: Annotated[
        list[str] | None,
        typer.Option(help="Plot only this figure, such as reach; may be repeated. All by default.", metavar="NAME"),
    ] = None,
    checkpoint: Checkpoint = "newest",
    trust: Trust = False,
    device: Device = "cpu",
) -> InspectResult:
    """Show how a trained model processes a text: attention maps, reach of heads, states and gradients.

    For every layer, the page has attention maps (also of recurrent mixers), their reach beside that of the decays,
    saturated gates, norms and ranks of the state, and gradient norms.

    [bold]seqmix inspect runs/retnet-tiny --text README.md[/bold]
    """
    require_writable(out)
    require_drawable("--out", out)
    model = load_run(
        run, device=require_device(device), choice=checkpoint_choice(checkpoint), on_note=note, trust=trust
    )
    if model.tokenizer is None:
        raise SeqmixError(f"inspect needs a run trained on text, but {run} was trained on a task")
    try:
        content = read_bytes(text).decode("utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{text} cannot be read: {error.strerror}") from error
    ids = model.tokenizer.encode(content)[None, :tokens].to(model.device)
    if ids.shape[1] < 2:
        raise SeqmixError(f"{text} has fewer than 2 tokens: choose a longer text")
    views = look(model, ids)
    facts = f"{ids.shape[1]:,} {model.tokenizer.unit} of {text.name}; {len(views)} layers"
    if figure or out.suffix.lower() != ".html":
        figures = [each for _, figures in sections_of(views) for each in figures]
        contents = {out: content_of(select_figures(figures, figure or []), out.suffix, title=str(run), text=facts)}
    else:
        contents = {out: render(views, str(run), facts)}
    write_files(contents)
    typer.echo(visible(f"{out} is written"))
    return InspectResult(str(out), ids.shape[1], [view.as_json() for view in views])
