"""`seqmix plot`: the curves of runs in one file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..experiments import image, page, svg
from ..experiments.curves import charts_of, read_curves
from ..experiments.files import write_text
from ..experiments.markup import element, xml
from ..registry import SeqmixError, nearest

ENDINGS = (".html", ".svg", ".png")
COLUMNS = 2
"""Charts in a row of a drawing."""


def plot(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders that `seqmix train` wrote, drawn over each other.", metavar="RUN...")
    ],
    out: Annotated[
        Path, typer.Option(help="What is written: a page, .html; or a drawing, .svg or .png.", metavar="FILE")
    ] = Path("plot.html"),
) -> None:
    """Draw what runs have measured: loss, learning rate, gradient norm, throughput, memory.

    Works while they train, too.

    [bold]seqmix plot runs/retnet-tiny[/bold]

    [bold]seqmix plot runs/retnet-tiny runs/attention-tiny --out both.svg[/bold]
    """
    ending = out.suffix.lower()
    if ending not in ENDINGS:
        raise SeqmixError(f"--out {out}: the name must end in one of {', '.join(ENDINGS)}{nearest(ending, ENDINGS)}")
    if ending == ".png":
        image.require_matplotlib()
    found = [read_curves(run, name) for run, name in zip(runs, names_of(runs), strict=True)]
    charts = charts_of(found)
    if not charts:
        raise SeqmixError(
            f"{', '.join(map(str, runs))}: no measurement is a finite number, so there is nothing to draw"
        )
    if ending == ".png":
        image.write(charts, out, COLUMNS)
    elif ending == ".svg":
        write_text(xml(svg.document(charts, COLUMNS)), out)
    else:
        title = found[0].name if len(found) == 1 else f"{len(found)} runs"
        made = ", ".join(f"{run.name} has made {run.last_step:,} steps" for run in found)
        header = element("header", element("h1", title), page.paragraph(f"{made}.", "quiet"))
        curves = page.section("Curves", page.legend(charts), page.figures(charts))
        write_text(page.page(title, header, curves), out)
    typer.echo(f"{out} is drawn")


def names_of(runs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart.

    Raises:
        SeqmixError: a run is given twice.
    """
    paths = [run.resolve() for run in runs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise SeqmixError(f"{runs[i]} is given twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]
