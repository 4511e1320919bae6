"""`seqmix paper`: reproduce claims of the RetNet paper."""

from pathlib import Path
from typing import Annotated

import typer

from ..experiments.retnet_paper.claims import CLAIMS, KEPT, LEARNED, TIMED, Scale, prove
from .options import Jobs

GROUPS = {"learned": LEARNED, "timed": TIMED, "all": CLAIMS}


def paper(
    claims: Annotated[list[str], typer.Argument(help=f"Claims: {', '.join((*CLAIMS, *GROUPS))}.", metavar="CLAIM...")],
    scale: Annotated[Scale, typer.Option(help="Size of the models and of the data.")] = "cpu",
    jobs: Jobs = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results; by default, with --scale cpu, the source of docs/explanation/paper.md."
        ),
    ] = None,
) -> None:
    """Reproduce claims of the RetNet paper by name.

    The group `learned` trains models, which takes half an hour. The group `timed` measures time, which needs an idle
    machine. --scale gpu uses the paper's sizes, on your own text. Finished measurements are not repeated.

    [bold]seqmix paper table6[/bold]

    [bold]seqmix paper learned --jobs 2[/bold]
    """
    folder = keep or (KEPT if scale == "cpu" else None)
    for claim in dict.fromkeys(name for word in claims for name in GROUPS.get(word, (word,))):
        if status := prove(claim, scale=scale, jobs=jobs, kept=folder, tell=typer.echo):
            raise typer.Exit(status)
