"""`seqmix paper`: reproduce claims of the RetNet paper."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..experiments.retnet_paper.claims import CLAIMS, LEARNED, TIMED, Scale, prove
from ..experiments.retnet_paper.verdict import Verdict
from .console import plain_table, terminal
from .options import Jobs
from .results import Ended

GROUPS = {"learned": LEARNED, "timed": TIMED, "all": CLAIMS}


@dataclass(frozen=True)
class PaperResult:
    """Result of `seqmix paper`."""

    claims: dict[str, Verdict]
    """The paper's figures and ours, by claim."""


def paper(
    claims: Annotated[list[str], typer.Argument(help=f"Claims: {', '.join((*CLAIMS, *GROUPS))}.", metavar="CLAIM...")],
    scale: Annotated[Scale, typer.Option(help="Size of the models and of the data.")] = "cpu",
    jobs: Jobs = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the studies of the claims, with their reports and values.", metavar="DIR")
    ] = Path("studies"),
) -> PaperResult | Ended[PaperResult]:
    """Reproduce claims of the RetNet paper by name, and compare them with the paper.

    It shows for each claim the paper's figures, ours, and whether both point in the same direction. The group `learned`
    trains models, which takes half an hour. The group `timed` measures time, which needs an idle machine. --scale gpu
    uses the paper's sizes, on your own text. Finished measurements are not repeated.

    [bold]seqmix paper table6[/bold]

    [bold]seqmix paper learned --jobs 2[/bold]
    """
    verdicts: dict[str, Verdict] = {}
    for claim in dict.fromkeys(name for word in claims for name in GROUPS.get(word, (word,))):
        status, verdict = prove(claim, scale=scale, jobs=jobs, out=out, on_note=typer.echo)
        if verdict is None:
            return Ended(PaperResult(verdicts), status)
        show(verdict)
        verdicts[claim] = verdict
    return PaperResult(verdicts)


def show(verdict: Verdict) -> None:
    """Print the figures of a claim and its summary."""
    console = terminal()
    rows = [(row.name, row.paper, row.ours, row.direction) for row in verdict.rows]
    console.print(plain_table(*verdict.heads, "direction", rows=rows, overflow="fold"))
    console.print(verdict.summary, soft_wrap=True)
