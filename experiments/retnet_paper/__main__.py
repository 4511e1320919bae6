"""Measure claims of the RetNet paper, each by its name.

python -m seqmix.experiments.retnet_paper table6
python -m seqmix.experiments.retnet_paper learned --jobs 2        all in which something is learned: half an hour
python -m seqmix.experiments.retnet_paper timed                   all in which something is timed: on a quiet machine
python -m seqmix.experiments.retnet_paper table6 --scale gpu      the paper's size, on text of your own
"""

from pathlib import Path
from typing import Annotated

import typer

from ...benchmarks.program import run_program
from .claims import CLAIMS, KEPT, LEARNED, TIMED, Scale, prove

GROUPS = {"learned": LEARNED, "timed": TIMED, "all": CLAIMS}


def main(
    claims: Annotated[list[str], typer.Argument(help=f"{', '.join((*CLAIMS, *GROUPS))}.", metavar="CLAIM...")],
    scale: Annotated[Scale, typer.Option(help="The size of models, and of what they read.")] = "cpu",
    jobs: Annotated[int | None, typer.Option(help="Runs at once.", min=1, show_default=False)] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="Where results are kept; for docs/paper.md by default, which has those of cpu alone."),
    ] = None,
) -> None:
    """Measure claims of the RetNet paper. What was finished is not measured again."""
    kept = keep or (KEPT if scale == "cpu" else None)
    for claim in dict.fromkeys(name for given in claims for name in GROUPS.get(given, (given,))):
        if status := prove(claim, scale=scale, jobs=jobs, kept=kept, tell=typer.echo):
            raise typer.Exit(status)


if __name__ == "__main__":
    run_program(main)
