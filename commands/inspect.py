"""`seqmix inspect`: what a trained model does with a text."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..experiments.figures.writer import content_of, require_drawable
from ..inspection.report import render, sections_of
from ..inspection.views import look
from ..registry import SeqmixError, read_bytes, write_files
from ..training import load_run
from .console import note
from .options import Checkpoint, Device, JsonFile, Run, Trust, checkpoint_choice, require_device, require_writable
from .output import visible
from .plot import chosen


def inspect(
    run: Run,
    text: Annotated[Path, typer.Option(help="The text it reads.", metavar="FILE")],
    tokens: Annotated[int, typer.Option(help="Tokens of the text that are read, from its start.", min=2)] = 256,
    out: Annotated[
        Path, typer.Option(help="What is written: a page, .html; or a drawing, .pdf, .svg or .png.", metavar="FILE")
    ] = Path("inspect.html"),
    figure: Annotated[
        list[str] | None, typer.Option(help="Draw this figure, such as reach. May be repeated.", metavar="NAME")
    ] = None,
    checkpoint: Checkpoint = "newest",
    trust: Trust = False,
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Show what a trained model does with a text: where heads look, how far back, states and gradients.

    The page has, for every layer, the weights with which outputs read tokens (of recurrent mixers too), their reach
    beside that of the decays, saturated gates, norms and ranks of the state, and gradient norms.

    [bold]seqmix inspect runs/retnet-tiny --text README.md[/bold]
    """
    require_writable(out, json_file)
    if json_file is not None and json_file.absolute() == out.absolute():
        raise SeqmixError(f"--out and --json are both {out}: give them two names")
    require_drawable("--out", out)
    model = load_run(run, device=require_device(device), choice=checkpoint_choice(checkpoint), tell=note, trust=trust)
    if model.tokenizer is None:
        raise SeqmixError(f"{run} has learned a task, whose tokens are not text")
    try:
        content = read_bytes(text).decode("utf-8", errors="replace")
    except OSError as error:
        raise SeqmixError(f"{text} cannot be read: {error.strerror}") from error
    ids = model.tokenizer.encode(content)[None, :tokens].to(model.device)
    if ids.shape[1] < 2:
        raise SeqmixError(f"{text} has no token to read")
    views = look(model, ids)
    facts = f"{ids.shape[1]:,} {model.tokenizer.unit} of {text.name}; {len(views)} layers"
    if figure or out.suffix.lower() != ".html":
        figures = [each for _, figures in sections_of(views) for each in figures]
        written = {out: content_of(chosen(figures, figure or []), out.suffix, title=str(run), text=facts)}
    else:
        written = {out: render(views, str(run), facts)}
    if json_file is not None:
        written[json_file] = json.dumps([view.as_json() for view in views], indent=2) + "\n"
    write_files(written)
    typer.echo(visible(f"{out} is written"))
