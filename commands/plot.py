"""`seqmix plot`: the curves of runs in one file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..experiments.curves import charts_of, read_curves
from ..experiments.drawing import draw, require_drawable
from ..registry import SeqmixError


def plot(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders that `seqmix train` wrote, drawn over each other.", metavar="RUN...")
    ],
    out: Annotated[
        Path, typer.Option(help="What is written: a page, .html; or a drawing, .svg, .png or .pdf.", metavar="FILE")
    ] = Path("plot.html"),
) -> None:
    """Plot the metrics of runs: loss, learning rate, gradient norm, throughput, memory.

    Works while they train, too.

    [bold]seqmix plot runs/retnet-tiny[/bold]

    [bold]seqmix plot runs/retnet-tiny runs/attention-tiny --out both.svg[/bold]
    """
    require_drawable("--out", out)
    found = [read_curves(run, name) for run, name in zip(runs, names_of(runs), strict=True)]
    charts = charts_of(found)
    if not charts:
        given = ", ".join(map(str, runs))
        raise SeqmixError(f"{given}: no measurement is a finite number, so there is nothing to draw")
    title = found[0].name if len(found) == 1 else f"{len(found)} runs"
    made = ", ".join(f"{run.name} has made {run.last_step:,} steps" for run in found)
    draw(charts, out, title=title, text=f"{made}.")
    typer.echo(f"{out} is drawn")


def names_of(runs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; a SeqmixError where a run is given twice."""
    paths = [run.resolve() for run in runs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise SeqmixError(f"{runs[i]} is given twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]
