"""`seqmix paper`: reproduce claims of the RetNet paper."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ...lab.paper.claims import CLAIMS, LEARNED, TIMED, Scale, plan_claim, prove, question_of, study_of
from ...lab.paper.verdict import Verdict
from ...registry import SeqmixError
from ..console import plain_table, terminal
from ..json_output import Ended
from ..options import Jobs
from .compare import StudyPlan, show_plan

GROUPS = {"learned": LEARNED, "timed": TIMED, "all": CLAIMS}


@dataclass(frozen=True)
class PaperResult:
    """Result of `seqmix paper`."""

    claims: dict[str, Verdict]
    """The paper's figures and ours, by claim."""


@dataclass(frozen=True)
class PaperPlan:
    """Result of `seqmix paper --dry-run`."""

    studies: dict[str, StudyPlan]
    """Plans of the studies that the claims are measured on, by name; several claims may share one."""


@dataclass(frozen=True)
class PaperList:
    """Result of `seqmix paper --list`."""

    claims: dict[str, str]
    """Questions of the claims, by name."""


def paper(
    claims: Annotated[
        list[str] | None, typer.Argument(help=f"Claims: {', '.join((*CLAIMS, *GROUPS))}.", metavar="CLAIM...")
    ] = None,
    scale: Annotated[Scale, typer.Option(help="Size of the models and of the data.")] = "cpu",
    jobs: Jobs = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the studies of the claims, with their reports and values.", metavar="DIR")
    ] = Path("studies"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate the studies and show their runs, without training.")
    ] = False,
    list_all: Annotated[bool, typer.Option("--list", help="List the claims.")] = False,
) -> PaperResult | Ended[PaperResult] | PaperPlan | PaperList:
    """Reproduce claims of the RetNet paper by name, and compare them with the paper.

    It shows for each claim the paper's figures, ours, and whether both point in the same direction. The group `learned`
    trains models, which takes half an hour. The group `timed` measures time, which needs an idle machine. --scale gpu
    uses the paper's sizes, on your own text. Finished measurements are not repeated.

    [bold]seqmix paper table6[/bold]

    [bold]seqmix paper learned --jobs 2[/bold]

    [bold]seqmix paper timed --dry-run[/bold]
    """
    if list_all:
        questions = {claim: question_of(claim, scale) for claim in CLAIMS}
        terminal().print(plain_table("claim", "question", rows=questions.items()))
        return PaperList(questions)
    if not claims:
        raise SeqmixError(f"paper needs a CLAIM, or several: {', '.join((*CLAIMS, *GROUPS))}; --list explains them")
    names = dict.fromkeys(name for word in claims for name in GROUPS.get(word, (word,)))
    if dry_run:
        return PaperPlan({name: _show_study(name, scale) for name in dict.fromkeys(map(study_of, names))})
    verdicts: dict[str, Verdict] = {}
    for claim in names:
        status, verdict = prove(claim, scale=scale, jobs=jobs, out=out, on_note=typer.echo)
        if verdict is None:
            return Ended(PaperResult(verdicts), status)
        show(verdict)
        verdicts[claim] = verdict
    return PaperResult(verdicts)


def _show_study(name: str, scale: Scale) -> StudyPlan:
    """Show the plan of the study of a claim; return it."""
    console = terminal()
    console.print(f"{name}:")
    return show_plan(plan_claim(name, scale), console)


def show(verdict: Verdict) -> None:
    """Print the figures of a claim and its summary."""
    console = terminal()
    rows = [(row.name, row.paper, row.ours, row.direction) for row in verdict.rows]
    console.print(plain_table(*verdict.heads, "direction", rows=rows, overflow="fold"))
    console.print(verdict.summary, soft_wrap=True)
