"""The `compare` command: a study from its file to its results, and what the terminal shows of it."""

import shlex
from pathlib import Path

from rich.console import Console

from ..experiments.collect import entry_result
from ..experiments.plan import Plan, plan
from ..experiments.results import Results
from ..experiments.runner import run_study
from ..experiments.study import STUDIES, find_study, load_study, shipped
from ..experiments.tables import notes, state_size, summary_table
from .console import plain_table, terminal
from .show import si
from .study_progress import StudyProgress

STUDY_FOLDER = Path("studies")


def compare_command(source: str, *, out: Path | None, jobs: int | None, dry_run: bool) -> int:
    """Make a study, or go on with it, and write what it found.

    Args:
        source: the name of a study that comes with the package, or a YAML file.
        out: its folder; studies/NAME by default.
        jobs: runs at once.
        dry_run: whether it is only checked and shown.

    Returns:
        An exit status: 0, 1 if runs failed, 130 if it was stopped.

    Raises:
        SeqmixError: the study cannot be made; nothing is written then.
    """
    file = find_study(source)
    planned = plan(load_study(file), file)
    console = terminal()
    if dry_run:
        _show_plan(planned, console)
        return 0
    folder = out or STUDY_FOLDER / planned.name
    with StudyProgress(console) as progress:
        results, outcome = run_study(planned, folder, jobs=jobs, observer=progress)
    show(results, console)
    again = f"seqmix compare {shlex.quote(source)}" + (f" --out {shlex.quote(str(out))}" if out else "")
    if outcome.stopped:
        console.print(f"stopped, with a checkpoint of every run; go on with: {again}")
        return 130
    console.print(f"{folder} has report.html, results.json, the tables and every run")
    if outcome.failed:
        console.print(f"{len(outcome.failed)} of {len(planned.runs)} runs failed; try them again with: {again}")
    return 1 if outcome.failed else 0


def list_studies(console: Console) -> None:
    """Print the studies that come with the package."""
    table = plain_table("study", "question")
    for name in shipped():
        table.add_row(name, load_study(STUDIES / f"{name}.yaml").question or "")
    console.print(table)


def show(results: Results, console: Console) -> None:
    """Print the summary, what was the same for all, and what to know beside it."""
    head, rows = summary_table(results)
    if rows:
        table = plain_table(*head, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for sentence in (*results.fairness, *notes(results)):
        console.print(sentence, soft_wrap=True)


def _show_plan(planned: Plan, console: Console) -> None:
    """What would be made."""
    if planned.study.question:
        console.print(planned.study.question)
    table = plain_table("entry", "mixers", "parameters", "forward/token", "state", overflow="fold")
    entries = [entry_result(entry) for entry in planned.entries]
    for entry in entries:
        table.add_row(
            entry.name,
            ", ".join(entry.mixers),
            f"{entry.parameters:,}",
            f"{si(entry.flops_per_token)}FLOP",
            state_size(entry),
        )
    console.print(table)
    for entry in entries:
        if entry.matched:
            console.print(f"{entry.name}: {entry.matched}")
    for sentence in planned.fairness:
        console.print(sentence, soft_wrap=True)
    total = si(sum(run.flops for run in planned.runs))
    console.print(f"{len(planned.runs)} {'run' if len(planned.runs) == 1 else 'runs'}, about {total}FLOP.")
