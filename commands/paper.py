"""`seqmix paper`: the RetNet paper, claim by claim."""

from pathlib import Path
from typing import Annotated

import typer

from ..experiments.retnet_paper.claims import CLAIMS, KEPT, LEARNED, TIMED, Scale, prove

GROUPS = {"learned": LEARNED, "timed": TIMED, "all": CLAIMS}


def paper(
    claims: Annotated[list[str], typer.Argument(help=f"{', '.join((*CLAIMS, *GROUPS))}.", metavar="CLAIM...")],
    scale: Annotated[Scale, typer.Option(help="The size of models, and of what they read.")] = "cpu",
    jobs: Annotated[int | None, typer.Option(help="Runs at once.", min=1)] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Where results are kept; for docs/explanation/paper.md by default, which has those of cpu alone."
        ),
    ] = None,
) -> None:
    """Measure claims of the RetNet paper, each by its name.

    `learned` are all in which something is learned, half an hour; `timed` need a machine that does nothing else;
    --scale gpu has the paper's sizes, on text of your own. What was finished is not measured again.

    [bold]seqmix paper table6[/bold]

    [bold]seqmix paper learned --jobs 2[/bold]
    """
    kept = keep or (KEPT if scale == "cpu" else None)
    for claim in dict.fromkeys(name for given in claims for name in GROUPS.get(given, (given,))):
        if status := prove(claim, scale=scale, jobs=jobs, kept=kept, tell=typer.echo):
            raise typer.Exit(status)
