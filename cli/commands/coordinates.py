"""`seqmix coordinates`: check that activations keep their size when the model becomes wider."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ...lab.coordinates import WIDTHS, Coordinate, figure_of
from ...lab.coordinates import coordinates as check
from ...lab.figures.writer import draw, require_drawable
from ...registry import SeqmixError
from ...training import load_config
from ..console import note, plain_table, terminal
from ..options import Overrides, require_writable
from ..output import visible


@dataclass(frozen=True)
class CoordinatesResult:
    """Result of `seqmix coordinates`."""

    widths: list[int]
    """Widths d_model, ascending."""
    steps: int
    """Number of training steps."""
    parts: list[Coordinate]
    """Sizes of the activations of each part of the model."""


def coordinates(
    config: Annotated[str, typer.Argument(help="A preset (retnet-tiny) or a YAML file.", metavar="CONFIG")],
    overrides: Overrides = None,
    widths: Annotated[str, typer.Option(help="Widths d_model, separated by commas.")] = ",".join(map(str, WIDTHS)),
    steps: Annotated[int, typer.Option(help="Number of training steps.", min=1)] = 10,
    batch: Annotated[int, typer.Option(help="Sequences per step.", min=1)] = 4,
    seeds: Annotated[int, typer.Option(help="Number of seeds to average over.", min=1)] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Draw the sizes: a page (.html) or an image (.pdf, .svg, .png).", metavar="FILE")
    ] = None,
) -> CoordinatesResult:
    """Check that training changes activations equally at every width of the model (coordinate check of muP).

    Models of several widths train for a few steps. If activations grow with the width, a wider model needs a lower
    learning rate. With a parametrization that fits the width, none grow.

    [bold]seqmix coordinates retnet-tiny model.parametrization="{kind: mup, base_width: 64}"[/bold]
    """
    chosen = _parse_widths(widths)
    require_writable(out)
    if out is not None:
        require_drawable("--out", out)
    loaded = load_config(config, overrides or [])
    result = check(
        loaded,
        chosen,
        steps=steps,
        batch_size=batch,
        seeds=seeds,
        on_width=lambda width: note(f"d_model = {width}: training {steps} steps"),
    )
    table = plain_table("activations", *map(str, chosen), "exponent", "")
    for one in result:
        table.add_row(one.part, *(f"{size:.3g}" for size in one.after), f"{one.exponent:+.2f}", one.verdict)
    console = terminal()
    console.print(table)
    growing = [one.part for one in result if one.verdict == "grows"]
    rate = f"{loaded.training.learning_rate:g}"
    console.print(
        f"Mean absolute values after {steps} steps with learning rate {rate}, by width; size ~ width^exponent. "
        + (f"These grow with the width: {', '.join(growing)}." if growing else "None grows with the width.")
    )
    if out is not None:
        draw([figure_of(result, chosen, steps)], out, title="Coordinate check", text=visible(str(config)))
        typer.echo(visible(f"{out} is written"))
    return CoordinatesResult(chosen, steps, result)


def _parse_widths(widths: str) -> list[int]:
    """Return the widths of the option; SeqmixError unless they are at least two different numbers above 0."""
    parts = [part.strip() for part in widths.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts) or len(set(parts)) < 2:
        raise SeqmixError(f"expected --widths as two or more different numbers, such as 64,128, got {widths!r}")
    return sorted(map(int, set(parts)))
