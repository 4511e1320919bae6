"""`seqmix compare`: run a study from its file, and show its results on the terminal."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from ...lab.figures.libraries import PlotsMissingError, charts_module, engine
from ...lab.study.columns import state_size, summary_table
from ...lab.study.comparisons import EntryComparison, comparisons
from ...lab.study.conclusion import conclusion
from ...lab.study.plan import Plan, plan
from ...lab.study.report import REPORT_FILE
from ...lab.study.results import Difference, EntryResult, Results, SummaryRow, where
from ...lab.study.results_file import RESULTS_FILE
from ...lab.study.run_results import entry_result
from ...lab.study.runner import run_study
from ...lab.study.study import STUDIES, find_study, load_study, shipped
from ...lab.study.tables import difference_tables, notes, speed_note
from ...lab.units import si
from ...registry import SeqmixError
from ..console import note, plain_table, terminal
from ..json_output import Ended
from ..options import Jobs, seconds_of
from ..study_progress import StudyProgress

MANY = 300
"""Number of runs above which a note says that planning takes a while."""


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """Result of `seqmix compare`; results.json in the folder has every measurement."""

    folder: str
    """Folder of the study."""
    state: Literal["finished", "failed", "stopped", "interrupted"]
    """`finished`; `failed`, if runs failed; `stopped`, at its time budget; `interrupted`, by a signal."""
    finished: int
    """Number of runs trained to the end, in earlier calls too."""
    runs: int
    """Number of all runs."""
    failed: dict[str, str]
    """Reason of each run that failed, by name."""
    subject: str
    """Entry that the question is about."""
    answer: str
    """The answer to the study's question, in words."""
    comparisons: list[EntryComparison]
    """Difference of each entry from the subject, with its simultaneous interval and verdict, as in `answer`."""
    summary: list[SummaryRow]
    """Statistics over seeds of each entry: mean, spread and the margin of the 95 % interval."""
    speed: str | None
    """Sentence on what `tokens_per_second` of the summary measures; null without speeds."""
    differences: list[Difference]
    """Configuration of each entry against the subject's: what is compared, and what else differs."""
    notes: list[str]
    """Sentences on what is equal, and what a reader should know."""


@dataclass(frozen=True)
class StudyPlan:
    """Result of `seqmix compare --dry-run`."""

    entries: list[EntryResult]
    """The entries with their costs."""
    runs: list[str]
    """Names of the runs, in the order in which they train."""
    flops: float
    """FLOPs of all runs."""
    notes: list[str]
    """Sentences on what is equal."""


@dataclass(frozen=True)
class StudyList:
    """Result of `seqmix compare --list`."""

    studies: dict[str, str]
    """Questions of the studies that the package ships, by name."""


def compare(
    study: Annotated[
        str | None, typer.Argument(help="A study: a YAML file, or a name from --list.", metavar="STUDY")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; studies/NAME by default.")] = None,
    jobs: Jobs = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time budget of the runs: 30m, 1h30m, or a number of seconds. At its end all runs stop with a "
            "checkpoint.",
            metavar="TIME",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate the study and show its runs, without training.")
    ] = False,
    list_all: Annotated[bool, typer.Option("--list", help="List the studies that the package ships.")] = False,
) -> CompareResult | Ended[CompareResult] | StudyPlan | StudyList:
    """Train several models under identical conditions and compare them.

    The output folder has every run, results.json, tables and an HTML report. Run the command again to resume a stopped
    study. All entries train with one seed before the next, so that a study that its budget ends early still compares
    like with like. The exit status is 1 if runs failed.

    [bold]seqmix compare recall[/bold]

    [bold]seqmix compare study.yaml --dry-run[/bold]
    """
    console = terminal()
    if list_all:
        questions = {name: load_study(STUDIES / f"{name}.yaml").question or "" for name in shipped()}
        console.print(plain_table("study", "question", rows=questions.items()))
        return StudyList(questions)
    if study is None:
        raise SeqmixError("compare needs a STUDY: a YAML file, or the name of a study that --list shows")
    seconds = None if budget is None else seconds_of("--budget", budget)
    file = find_study(study)
    loaded = load_study(file)
    if loaded.size > MANY:
        note(f"planning {loaded.size:,} runs takes a while")
    planned = plan(loaded, file)
    if dry_run:
        return show_plan(planned, console)
    folder = out or Path("studies") / planned.name
    with StudyProgress(console) as progress:
        results, outcome = run_study(planned, folder, jobs=jobs, observer=progress, budget=seconds)
    show(results, console)
    result = CompareResult(
        folder=str(folder),
        state=outcome.state,
        finished=outcome.finished,
        runs=len(planned.runs),
        failed=outcome.failed,
        subject=results.about,
        answer=conclusion(results),
        comparisons=comparisons(results),
        summary=list(results.summary),
        speed=speed_note(results),
        differences=list(results.differences),
        notes=[*results.fairness, *notes(results)],
    )
    command = f"seqmix compare {shlex.quote(study)}" + (f" --out {shlex.quote(str(out))}" if out else "")
    if outcome.stopped:
        reason = f"the time budget of {budget} is spent" if outcome.out_of_time else "stopped"
        console.print(
            f"{reason}, with a checkpoint of every run; {outcome.finished} of {len(planned.runs)} runs are finished; "
            f"resume with: {command}",
            soft_wrap=True,
        )
        return result if outcome.out_of_time else Ended(result, 130)
    console.print(f"{folder} has {RESULTS_FILE}, the tables and every run")
    report = folder / REPORT_FILE
    console.print(
        f"{report} is written" if report.is_file() else f"{report} is missing: {_missing_report_reason(folder)}"
    )
    if outcome.failed:
        console.print(f"{len(outcome.failed)} of {len(planned.runs)} runs failed; retry them with: {command}")
        return Ended(result, 1)
    return result


def _missing_report_reason(folder: Path) -> str:
    """Return why a study has no report, and the command that writes it."""
    reason = "its figures could not be drawn"
    try:
        engine()
        charts_module()
    except PlotsMissingError as error:
        reason = str(error)
    return f"{reason}; then write it with: seqmix plot {shlex.quote(str(folder))}"


def show(results: Results, console: Console) -> None:
    """Print the summary table, the answer, what else differs, the conditions that all runs share, and notes."""
    headers, rows = summary_table(results)
    if rows:
        console.print(plain_table(*headers, rows=rows, overflow="fold"))
    console.print(conclusion(results), soft_wrap=True)
    _show_differences(results.differences, results.about, console)
    for sentence in (*results.fairness, *notes(results)):
        console.print(sentence, soft_wrap=True)


def _show_differences(differences: Sequence[Difference], subject: str, console: Console) -> None:
    """Print what differs between entries besides what the study compares."""
    for variant, headers, rows in difference_tables(differences, subject):
        console.print(f"what else differs{where(variant)}:")
        console.print(plain_table(*headers, rows=rows, overflow="fold"))


def show_plan(planned: Plan, console: Console) -> StudyPlan:
    """Print the entries of a study with their costs, and the number of runs; return them."""
    if planned.study.question:
        console.print(planned.study.question)
    entries = [entry_result(entry) for entry in planned.entries]
    rows = [
        (e.name, ", ".join(e.mixers), f"{e.parameters:,}", f"{si(e.flops_per_token)}FLOP", state_size(e))
        for e in entries
    ]
    headers = ("entry", "mixers", "parameters", "forward/token", "state")
    console.print(plain_table(*headers, rows=rows, overflow="fold"))
    for entry in entries:
        if entry.matched:
            console.print(f"{entry.name}{where(planned.runs[0].variant)}: {entry.matched}")
    for sentence in planned.fairness:
        console.print(sentence, soft_wrap=True)
    _show_differences(planned.differences, planned.subject, console)
    total = sum(run.flops for run in planned.runs)
    console.print(f"{len(planned.runs)} {'run' if len(planned.runs) == 1 else 'runs'}, about {si(total)}FLOP.")
    return StudyPlan(entries, [run.name for run in planned.runs], total, list(planned.fairness))
