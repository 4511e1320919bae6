"""`seqmix paper`: the RetNet paper, claim by claim."""

from pathlib import Path
from typing import Annotated

import typer

from ..experiments.retnet_paper.claims import CLAIMS, KEPT, LEARNED, TIMED, Scale, prove
from .options import Jobs

GROUPS = {"learned": LEARNED, "timed": TIMED, "all": CLAIMS}


def paper(
    claims: Annotated[list[str], typer.Argument(help=f"{', '.join((*CLAIMS, *GROUPS))}.", metavar="CLAIM...")],
    scale: Annotated[Scale, typer.Option(help="Size of the models and of the data.")] = "cpu",
    jobs: Jobs = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results; by default, for cpu, the folder that docs/explanation/paper.md is made from."
        ),
    ] = None,
) -> None:
    """Reproduce claims of the RetNet paper by name.

    `learned` trains models, for half an hour in all; `timed` needs an idle machine; --scale gpu has the paper's sizes,
    on your own text. Finished measurements are not repeated.

    [bold]seqmix paper table6[/bold]

    [bold]seqmix paper learned --jobs 2[/bold]
    """
    kept = keep or (KEPT if scale == "cpu" else None)
    for claim in dict.fromkeys(name for given in claims for name in GROUPS.get(given, (given,))):
        if status := prove(claim, scale=scale, jobs=jobs, kept=kept, tell=typer.echo):
            raise typer.Exit(status)
