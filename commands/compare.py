"""The `compare` command: a study from its file to its results."""

import shlex
from pathlib import Path

from rich.console import Console

from ..experiments import speed
from ..experiments.collect import RUNS, collect, entry_result
from ..experiments.plan import Plan, plan
from ..experiments.progress import StudyProgress
from ..experiments.report import write_report
from ..experiments.results import Results, SpeedResult, write
from ..experiments.runner import default_jobs, is_left_alone, locked, make_runs
from ..experiments.study import STUDIES, StudyError, find_study, load_study, shipped
from ..experiments.tables import show, write_tables
from .console import plain_table, terminal
from .progress import StopRequest
from .show import si, si_bytes

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
    try:
        return _make(planned, folder, source, out, jobs, console)
    except OSError as error:
        raise StudyError(f"a study cannot be written to {folder}: {error.strerror or error}") from error


def _make(planned: Plan, folder: Path, source: str, out: Path | None, jobs: int | None, console: Console) -> int:
    """Make what is not there, and write what it found; an exit status."""
    left = {run.name: run.flops for run in planned.runs if not is_left_alone(run, folder / RUNS / run.name)}
    progress = StudyProgress(console, left, len(planned.runs))
    with locked(folder, progress):
        if finished := len(planned.runs) - len(left):
            console.print(f"{finished} of {len(planned.runs)} runs are finished already")
        with StopRequest() as stop, progress:
            done = make_runs(
                planned, folder, jobs=jobs or default_jobs(planned.study.threads), shown=progress, stop=stop.made
            )
        results = _written(planned, folder, done.failed, None)
        if not done.stopped and planned.study.speed is not None:
            with console.status("timing") as status:
                timed = speed.measure(planned, folder, lambda text: status.update(f"timing {text}"))
            results = _written(planned, folder, done.failed, timed)
        show(results, console)
        again = f"seqmix compare {shlex.quote(source)}" + (f" --out {shlex.quote(str(out))}" if out else "")
        if done.stopped:
            console.print(f"stopped, with a checkpoint of every run; go on with: {again}")
            return 130
        console.print(f"{folder} has report.html, results.json, the tables and every run")
        if done.failed:
            console.print(f"{len(done.failed)} of {len(planned.runs)} runs failed; try them again with: {again}")
        return 1 if done.failed else 0


def list_studies(console: Console) -> None:
    """Print the studies that come with the package."""
    table = plain_table("study", "question")
    for name in shipped():
        table.add_row(name, load_study(STUDIES / f"{name}.yaml").question or "")
    console.print(table)


def _written(planned: Plan, folder: Path, failed: dict[str, str], timed: SpeedResult | None) -> Results:
    results = collect(planned, folder, failed=failed, speed=timed)
    write(results, folder)
    write_tables(results, folder)
    write_report(results, folder)
    return results


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
            si_bytes(entry.state_bytes) + (", grows" if entry.state_grows else ""),
        )
    console.print(table)
    for entry in entries:
        if entry.matched:
            console.print(f"{entry.name}: {entry.matched}")
    for sentence in planned.fairness:
        console.print(sentence, soft_wrap=True)
    total = si(sum(run.flops for run in planned.runs))
    console.print(f"{len(planned.runs)} {'run' if len(planned.runs) == 1 else 'runs'}, about {total}FLOP.")
