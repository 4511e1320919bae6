"""`seqmix plot`: the figures of runs or of a study, as a page or for a paper."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..experiments.figures.figure import Figure
from ..experiments.figures.writer import COLUMN, draw, require_drawable
from ..experiments.report import write_report
from ..experiments.results import RESULTS_FILE, read_results
from ..experiments.run_figures import figures_of, read_curves
from ..experiments.study_figures import Plots
from ..registry import SeqmixError, require_name
from ..training.monitoring.logging import METRICS_FILE
from .output import visible


def plot(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Folders that `seqmix train` wrote, drawn over each other; or one that `seqmix compare` wrote.",
            metavar="STUDY|RUN...",
        ),
    ],
    figure: Annotated[
        list[str] | None,
        typer.Option(
            help="Draw this figure, such as loss; all by default. May be given several times.", metavar="NAME"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="What is written: a page, .html; or a drawing, .pdf, .svg or .png. plot.html by default; of a study, "
            "its report.html.",
            metavar="FILE",
        ),
    ] = None,
    width: Annotated[
        float, typer.Option(help="Inches, of a drawing: a paper's column; 6.75 for two columns.", metavar="INCHES")
    ] = COLUMN,
) -> None:
    """Draw what runs or a study measured: an interactive page, or figures for a paper.

    Works while runs train, too.

    [bold]seqmix plot runs/retnet-tiny runs/attention-tiny[/bold]

    [bold]seqmix plot studies/recall --figure accuracy-by-pairs --out recall.pdf[/bold]
    """
    if not 1.5 <= width <= 30:
        raise SeqmixError(f"--width is {width:g} inches; allowed: from 1.5 to 30")
    study = _study(folders)
    if study is not None and out is None and not figure:
        typer.echo(f"{write_report(read_results(study), study)} is written")
        return
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
        given = ", ".join(map(str, folders))
        raise SeqmixError(f"{given}: no measurement is a finite number, so there is nothing to draw")
    draw(chosen(figures, figure or []), out, width=width, title=title, text=text)
    typer.echo(visible(f"{out} is written"))


def _study(folders: Sequence[Path]) -> Path | None:
    """The folder of a study, if one was given; a SeqmixError where it was not given alone."""
    studies = [folder for folder in folders if (folder / RESULTS_FILE).is_file()]
    if studies and len(folders) > 1:
        raise SeqmixError(f"{studies[0]} is a study ({RESULTS_FILE}), which is drawn alone; {len(folders)} were given")
    for folder in folders:
        if not studies and folder.is_dir() and not (folder / METRICS_FILE).is_file():
            raise SeqmixError(f"{folder} is not a run, which has {METRICS_FILE}, nor a study, which has {RESULTS_FILE}")
    return studies[0] if studies else None


def chosen(figures: Sequence[Figure], names: Sequence[str]) -> list[Figure]:
    """The figures of these names, all where there are none; a SeqmixError where one does not exist."""
    for name in names:
        require_name("figure", name, [figure.name for figure in figures])
    return [figure for figure in figures if not names or figure.name in names]


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
