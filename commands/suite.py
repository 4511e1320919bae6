"""`seqmix suite`: measure mixers on the tasks that tell them apart."""

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..experiments.plan import PlannedRun
from ..experiments.runner import default_jobs, run_study
from ..experiments.suite.budget import fit, left_out, seconds_of, time_runs
from ..experiments.suite.scores import (
    PAGE_FILE,
    SCORES_FILE,
    TaskScores,
    comparable,
    merge,
    new_scores,
    read_scores,
    score_table,
    task_scores,
    write_scores,
)
from ..experiments.suite.tasks import Candidate, Extent, Metric, PlannedTask, Size, load_settings, write_studies
from ..mixers import MIXERS
from ..registry import Config, SeqmixError, load, write_file
from ..registry.loading import dump
from .console import plain_table, terminal
from .options import Jobs
from .show import si
from .study_progress import StudyProgress

REFERENCES = ("attention", "retention")
"""Mixers that stand beside those that are asked for."""
EXTENT_FILE = "extent.yaml"


class Chosen(Config):
    """What a budget has chosen: a call that goes on keeps it."""

    asked: tuple[str, ...]
    steps: float
    one_rate: bool
    one_seed: bool
    tasks: tuple[str, ...]


def suite(
    mixers: Annotated[
        list[str] | None,
        typer.Argument(
            help="Kinds of mixers (or all: those of the library but parallel_hybrid), plug-ins (module:Class), "
            "NAME={kind: MIXER, ...} with options, presets or files, whose blocks are taken.",
            metavar="[MIXER]...",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Only these tasks, as names with commas; --list shows all.", metavar="NAME,...")
    ] = None,
    match: Annotated[Metric, typer.Option(help="What all models have the same of.")] = "parameters",
    size: Annotated[
        Size, typer.Option(help="The published settings, for GPUs, or small ones for two cores.")
    ] = "small",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time that it may take: learning rates, seeds, steps and tasks are left out until it fits.",
            metavar="30m",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One learning rate and one seed.")] = False,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            help="Rows of another call too: a folder, its suite.json, or the leaderboard's, by the name SIZE-MATCH.",
            metavar="FOLDER|NAME",
        ),
    ] = None,
    references: Annotated[
        bool, typer.Option(help=f"Measure {' and '.join(REFERENCES)} too, as rows to compare with.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Output folder; studies/suite-SIZE-MATCH by default.")] = None,
    jobs: Jobs = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, without training.")] = False,
    list_all: Annotated[bool, typer.Option("--list", help="List the tasks.")] = False,
) -> None:
    """Measure mixers on recall, copying and state tracking, and show one table.

    Each task is a study in the output folder, with a report. Run the command again to resume a suite that was stopped,
    or with more mixers to add their rows. The exit status is 1 if runs failed.

    [bold]seqmix suite delta_net mamba2 --budget 30m[/bold]

    [bold]seqmix suite my_module:MyMixer --beside results/suite.json[/bold]
    """
    console = terminal()
    settings = load_settings(size)
    if quick and budget is not None:
        raise SeqmixError("--quick and --budget both say how much is run: leave one out")
    if list_all:
        rows = [(name, task.measures, task.source) for name, task in settings.tasks.items()]
        console.print(plain_table("task", "measures", "source", rows=rows, overflow="fold"))
        return
    others = [read_scores(path) for path in beside or ()]
    folder = out or Path("studies") / f"suite-{size}-{match}"
    if folder.exists() and not folder.is_dir():
        raise SeqmixError(f"--out {folder} is a file: choose a folder")
    earlier = read_scores(folder) if (folder / SCORES_FILE).is_file() else None
    chosen = settings.chosen(tasks.split(",") if tasks else [])
    given = [*(REFERENCES if references else ())]
    given += [kind for each in mixers or () for kind in (_every_kind() if each == "all" else [each])]
    named: dict[str, Candidate] = {}
    for each in map(Candidate.of, given):
        if named.setdefault(each.name, each) != each:
            raise SeqmixError(f"two mixers are called {each.name}: give one another name, NAME={{kind: MIXER, ...}}")
    candidates = list(named.values())
    if not candidates:
        raise SeqmixError("nothing is measured: name a mixer, or leave out --no-references")
    given_jobs = jobs is not None
    jobs = jobs or default_jobs(1)
    with tempfile.TemporaryDirectory() as temporary, console.status("") as status:
        extent = Extent(one_rate=quick, one_seed=quick)
        names = list(chosen)
        asked = (str(size), str(match), budget or "", *chosen)
        if budget is not None:
            planned = write_studies(Path(temporary), settings, chosen, candidates, match, extent, status.update)
            extent, names = _earlier(folder, asked) or _fitting(planned, seconds_of(budget) * jobs, console)
        notes = left_out(extent, names, list(chosen))
        chosen = {name: chosen[name] for name in names}
        place = Path(temporary) if dry_run else folder
        planned = write_studies(place, settings, chosen, candidates, match, extent, status.update)
    words = [*(mixers or ()), *([f"--tasks={tasks}"] if tasks else ()), f"--match={match}", f"--size={size}"]
    words += [f"--budget={budget}"] if budget else []
    words += [*(["--quick"] if quick else ()), *(() if references else ("--no-references",))]
    command = f"seqmix suite {shlex.join(words)}"
    more = [*(("--out", str(out)) if out else ()), *(("--jobs", str(jobs)) if given_jobs else ())]
    again = shlex.join(["seqmix", "suite", *words, *more, *(f"--beside={path}" for path in beside or ())])
    scores = new_scores(size, match, command, notes, planned)
    if earlier is not None:
        earlier = comparable(scores, earlier)
        others.insert(0, earlier)
    for other in others:
        merge(scores, other)  # refuses what could not be compared before anything is trained
    if dry_run:
        _show(planned, notes, console)
        return
    if budget is not None:
        _remember(folder, asked, extent, tuple(chosen))
    runs = sum(len(task.plan.runs) for task in planned)
    console.print(
        f"{runs} runs, of {', '.join(named)} on {len(planned)} tasks, {jobs} at once, into {folder}; less with "
        "--quick, --budget 10m or --tasks NAME; --dry-run shows the plan; Ctrl-C stops, and the same command resumes",
        soft_wrap=True,
    )
    failed = 0
    shown = scores
    for number, task in enumerate(planned):
        later = sum(run.flops for other in planned[number + 1 :] for run in other.plan.runs)
        console.print(f"{task.name}, task {number + 1} of {len(planned)}: {task.task.measures}")
        with _Progress(console, later) as progress:
            results, outcome = run_study(task.plan, folder / task.name, jobs=jobs, observer=progress)
        scores.tasks[task.name] = task_scores(task, results)
        failed += len(outcome.failed)
        shown = reduce(merge, others, scores)
        write_scores(shown, folder)
        if outcome.stopped:
            console.print(f"stopped, with a checkpoint of every run; resume with: {again}")
            raise typer.Exit(130)
    head, rows = score_table(shown)
    console.print(plain_table(*head, rows=rows, overflow="fold"))
    for sentence in (*shown.notes, *_without_figure(shown.tasks)):
        console.print(sentence, soft_wrap=True)
    console.print(f"{folder} has {PAGE_FILE}, {SCORES_FILE} and a folder with the report of each task")
    if failed:
        console.print(f"{failed} runs failed; retry them with: {again}")
        raise typer.Exit(1)


def _every_kind() -> list[str]:
    """What `all` is: every mixer of the library that needs no options; a hybrid of mixers has to be given them."""
    given = {"kind", "n_heads"}  # that the study sets
    fields = {kind: mixer.model_fields.items() for kind, mixer in MIXERS.built_in().items()}
    return [kind for kind, own in fields.items() if given.issuperset(name for name, it in own if it.is_required())]


class _Progress(StudyProgress):
    """The progress of one task, with the time that the later ones take."""

    def __init__(self, console: Console, later: float) -> None:
        super().__init__(console)
        self.later = later
        """FLOPs of the tasks that follow."""

    def begin(self, runs: Sequence[PlannedRun], total: int) -> None:
        """Weigh the later tasks as one run that does not begin."""
        super().begin(runs, total)
        self.forecast.weights["later tasks"] = self.later


def _fitting(planned: Sequence[PlannedTask], budget: float, console: Console) -> tuple[Extent, list[str]]:
    """What fits into so many core-seconds, and its tasks."""
    console.print("timing a few steps of every run")
    rates = {task.name: len(task.plan.study.learning_rates) for task in planned}
    extent, names, seconds = fit(time_runs(planned), rates, len(planned[0].plan.study.seeds), budget)
    console.print(f"{', '.join(names)}: about {seconds / 60:.0f} core-minutes")
    return extent, names


def _earlier(folder: Path, asked: Sequence[str]) -> tuple[Extent, list[str]] | None:
    """What was chosen in this folder, where the same was asked: rows of all calls are of equal runs."""
    file = folder / EXTENT_FILE
    if not file.is_file() or (found := load(Chosen, file, presets=folder)).asked != tuple(asked):
        return None
    return Extent(found.steps, found.one_rate, found.one_seed), list(found.tasks)


def _remember(folder: Path, asked: tuple[str, ...], extent: Extent, tasks: tuple[str, ...]) -> None:
    chosen = Chosen(asked=asked, **asdict(extent), tasks=tasks)
    write_file(dump(chosen), folder / EXTENT_FILE)


def _show(planned: Sequence[PlannedTask], notes: Sequence[str], console: Console) -> None:
    """Print what would run."""
    rows = [
        (
            task.name,
            str(len(task.plan.runs)),
            f"{task.plan.runs[0].config.training.steps:,}",
            f"{min(entry.cost.parameters for entry in task.plan.entries):,}",
            f"{si(sum(run.flops for run in task.plan.runs))}FLOP",
        )
        for task in planned
    ]
    console.print(plain_table("task", "runs", "steps", "parameters", "cost", rows=rows))
    for task in planned:
        for name, why in task.left_out.items():
            console.print(f"{task.name} leaves out {name}: {why}", soft_wrap=True)
    for sentence in notes:
        console.print(sentence, soft_wrap=True)


def _without_figure(tasks: dict[str, TaskScores]) -> list[str]:
    return [
        f"{name} has no figure of {entry}: {why}"
        for name, task in tasks.items()
        for entry, why in task.left_out.items()
    ]
