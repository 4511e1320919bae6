"""`seqmix plot`: plot runs or a study, as a page or as figures for a paper."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ...lab.figures.figure import Figure
from ...lab.figures.writer import COLUMN, draw, require_drawable
from ...lab.study.report import write_report
from ...lab.study.results_file import RESULTS_FILE, read_results
from ...lab.study.run_figures import figures_of, read_curves
from ...lab.study.study_figures import Plots
from ...registry import DataError, SeqmixError, require_name
from ...training.monitoring.metrics_file import METRICS_FILE
from ..output import visible


@dataclass(frozen=True)
class PlotResult:
    """Result of `seqmix plot`."""

    out: str
    """The page or image that was written."""


def plot(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Run directories of `seqmix train`, plotted in the same axes; or one folder of `seqmix compare`.",
            metavar="STUDY|RUN...",
        ),
    ],
    figure: Annotated[
        list[str] | None,
        typer.Option(help="Plot only this figure, such as loss; may be repeated. All by default.", metavar="NAME"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output file: a page (.html) or an image (.pdf, .svg, .png). By default plot.html; for a study, its "
            "report.html.",
            metavar="FILE",
        ),
    ] = None,
    width: Annotated[
        float,
        typer.Option(
            help="Width of an image: by default one column of a paper; 6.75 for two columns.", metavar="INCHES"
        ),
    ] = COLUMN,
) -> PlotResult:
    """Plot the measurements of runs or of a study: an interactive page, or figures for a paper.

    Runs that are still training can be plotted, too.

    [bold]seqmix plot runs/retnet-tiny runs/attention-tiny[/bold]

    [bold]seqmix plot studies/recall --figure accuracy-by-pairs --out recall.pdf[/bold]
    """
    if not 1.5 <= width <= 30:
        raise SeqmixError(f"expected --width from 1.5 to 30 inches, got {width:g}")
    study = _study(folders)
    if study is not None and out is None and not figure:
        written = write_report(read_results(study), study)
        typer.echo(f"{written} is written")
        return PlotResult(str(written))
    out = out or Path("plot.html")
    require_drawable("--out", out)
    if study is not None:
        title = text = (results := read_results(study)).name
        figures = Plots(results).all()
    else:
        runs = [read_curves(run, name) for run, name in zip(folders, names_of(folders), strict=True)]
        title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
        text = ", ".join(f"{run.name} has made {run.last_step:,} steps" for run in runs) + "."
        figures = figures_of(runs)
    if not figures:
        names = ", ".join(map(str, folders))
        raise SeqmixError(f"there is nothing to plot: no measurement of {names} is a finite number")
    draw(select_figures(figures, figure or []), out, width=width, title=title, text=text)
    typer.echo(visible(f"{out} is written"))
    return PlotResult(str(out))


def _study(folders: Sequence[Path]) -> Path | None:
    """Return the folder of the study among the folders, None if they are runs; SeqmixError if they are mixed."""
    studies = [folder for folder in folders if (folder / RESULTS_FILE).is_file()]
    if studies and len(folders) > 1:
        raise SeqmixError(
            f"{studies[0]} is a study (it has {RESULTS_FILE}), which is plotted alone: expected 1 folder, got "
            f"{len(folders)}"
        )
    for folder in folders:
        if not studies and folder.is_dir() and not (folder / METRICS_FILE).is_file():
            raise DataError(f"{folder} is neither a run ({METRICS_FILE}) nor a study ({RESULTS_FILE})")
    return studies[0] if studies else None


def select_figures(figures: Sequence[Figure], names: Sequence[str]) -> list[Figure]:
    """Return the figures with these names, or all if there are no names; SeqmixError if a figure does not exist."""
    for name in names:
        require_name("figure", name, [figure.name for figure in figures])
    return [figure for figure in figures if not names or figure.name in names]


def names_of(runs: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that distinguish them; SeqmixError if a run is given twice."""
    paths = [run.resolve() for run in runs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise SeqmixError(f"{runs[i]} is given twice: leave one out")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]
