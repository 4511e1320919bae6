"""`seqmix suite`: measure mixers on tasks that distinguish them."""

import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from rich.console import Console

from ...lab.study.plan import PlannedRun
from ...lab.study.runner import default_jobs, run_study
from ...lab.suite.budget import fit, left_out, time_runs
from ...lab.suite.score_page import ORDER, accessory_table, score_table, uncertainty, write_scores
from ...lab.suite.scores import (
    PAGE_FILE,
    PUBLISHED,
    SCORES_FILE,
    Scores,
    TaskScores,
    comparable,
    merge,
    new_scores,
    read_scores,
    task_scores,
)
from ...lab.suite.tasks import Candidate, Extent, Metric, PlannedTask, Size, load_settings, write_studies
from ...lab.units import si
from ...mixers import MIXERS
from ...registry import Config, SeqmixError, load, write_file
from ...registry.loading import dump
from ...registry.yaml import parse
from ..console import plain_table, terminal
from ..json_output import Ended
from ..options import Jobs, seconds_of
from ..study_progress import StudyProgress

REFERENCES = ("attention", "retention")
"""Mixers that are measured for comparison."""
EXTENT_FILE = "extent.yaml"
"""File in the output folder with the tasks, steps, learning rates and seeds that fit into a budget."""


class _SavedExtent(Config):
    """Contents of `EXTENT_FILE`: the extent chosen for a budget, which a resumed suite keeps."""

    deprecated_names: ClassVar[Mapping[str, str]] = {"asked": "arguments", "one_rate": "untuned"}
    arguments: tuple[str, ...]
    """Size, match, budget, number of seeds, values of --equal and tasks that the command was called with."""
    steps: float
    """Fraction of the steps in the settings, at most 1."""
    untuned: bool
    """True if the first learning rate is used, without tuning."""
    one_seed: bool
    """True if only the first seed is used."""
    tasks: tuple[str, ...]
    """Names of the tasks that fit into the budget."""


@dataclass(frozen=True)
class SuiteResult:
    """Result of `seqmix suite`."""

    folder: str
    """Output folder; each task has a study in it, with its own status.json."""
    failed: int
    """Number of runs that failed."""
    scores: Scores
    """Scores by task, as in suite.json, with 95 % intervals."""


@dataclass(frozen=True)
class SuitePlan:
    """Result of `seqmix suite --dry-run`."""

    tasks: dict[str, list[str]]
    """Names of the runs, by task."""
    notes: list[str]
    """Sentences on the parts of the suite that are left out."""


@dataclass(frozen=True)
class TaskList:
    """Result of `seqmix suite --list`."""

    tasks: dict[str, str]
    """Property that each task measures, by name."""


def suite(
    mixers: Annotated[
        list[str] | None,
        typer.Argument(
            help="Mixer kinds (or `all`, every built-in mixer except parallel_hybrid), plug-ins (module:Class), mixers "
            "with options (NAME={kind: MIXER, ...}), or presets and files, whose blocks are used.",
            metavar="[MIXER]...",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks, separated by commas: those of the leaderboard by default, `all` for all that --list shows.",
            metavar="NAME,...",
        ),
    ] = None,
    match: Annotated[Metric, typer.Option(help="Quantity that is equal in all models.")] = "parameters",
    size: Annotated[
        Size, typer.Option(help="Size of the tasks: the published settings, for GPUs, or small ones for two CPU cores.")
    ] = "small",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time budget: 30m, 1h30m, or a number of seconds. Tasks are left out, then tuning, seeds and steps "
            "are reduced, until the suite fits.",
            metavar="TIME",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Use one learning rate and one seed.")] = False,
    seeds: Annotated[
        int | None, typer.Option(help="Number of seeds; by default, that of the settings.", min=1, max=100)
    ] = None,
    equal: Annotated[
        list[str] | None,
        typer.Option(
            help="Set this option in every mixer that has it, such as short_conv=4; may be repeated.",
            metavar="OPTION=VALUE",
        ),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            help="Add the rows of another suite: a folder, a suite.json, or the name SIZE-MATCH for the leaderboard; "
            "may be repeated.",
            metavar="FOLDER|NAME",
        ),
    ] = None,
    published: Annotated[
        bool, typer.Option(help="Add the leaderboard's rows, if they were measured under the same conditions.")
    ] = True,
    references: Annotated[
        bool,
        typer.Option(help=f"Also measure {' and '.join(REFERENCES)} for comparison, if their rows are not known."),
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Output folder; studies/suite-SIZE-MATCH by default.")] = None,
    jobs: Jobs = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, without training.")] = False,
    list_all: Annotated[bool, typer.Option("--list", help="List the tasks.")] = False,
) -> SuiteResult | Ended[SuiteResult] | SuitePlan | TaskList:
    """Measure mixers on recall, copying and state tracking, and show one table.

    Each task is a study in the output folder, with its own report. Run the command again to resume a stopped suite, or
    with other mixers to add their rows. The exit status is 1 if runs failed.

    [bold]seqmix suite delta_net mamba2 --budget 30m[/bold]

    [bold]seqmix suite my_module:MyMixer --beside results/suite.json[/bold]
    """
    console = terminal()
    settings = load_settings(size)
    seconds = None if budget is None else seconds_of("--budget", budget)
    if quick and budget is not None:
        raise SeqmixError("--quick and --budget both limit the runs: leave one of them out")
    if seeds is not None:
        if quick:
            raise SeqmixError("--quick uses one seed, but --seeds sets their number: leave one of them out")
        settings = settings.model_copy(update={"seeds": tuple(range(seeds))})
    options = _equal_options(equal or [])
    if list_all:
        rows = [
            (name, "yes" if name in settings.default_tasks else "", task.measures, task.source)
            for name, task in settings.tasks.items()
        ]
        console.print(plain_table("task", "leaderboard", "measures", "source", rows=rows, overflow="fold"))
        return TaskList({name: task.measures for name, task in settings.tasks.items()})
    usual = not (quick or budget or seeds or equal)
    chosen = settings.chosen(tasks.split(",") if tasks else [])
    others = [read_scores(path) for path in beside or ()]
    if published and usual:
        others += _published(size, match, list(chosen))
    folder = out or Path("studies") / f"suite-{size}-{match}"
    if folder.exists() and not folder.is_dir():
        raise SeqmixError(f"--out {folder} is a file: choose a folder")
    earlier = read_scores(folder) if (folder / SCORES_FILE).is_file() else None
    sources = [each for each in REFERENCES if references and not _known(each, list(chosen), others)]
    sources += [kind for each in mixers or () for kind in (_all_kinds() if each == "all" else [each])]
    by_name: dict[str, Candidate] = {}
    for each in map(Candidate.of, sources):
        if by_name.setdefault(each.name, each) != each:
            raise SeqmixError(f"two mixers are called {each.name}: rename one with NAME={{kind: MIXER, ...}}")
    candidates = list(by_name.values())
    if not candidates:
        raise SeqmixError("there is no mixer to measure: name one, or `all`")
    subjects = [each for each in sources if each not in REFERENCES] or sources
    plan_tasks = partial(write_studies, equal=options, subject=Candidate.of(subjects[0]).name)
    jobs_option = [] if jobs is None else ["--jobs", str(jobs)]
    jobs = jobs or default_jobs(1)
    with tempfile.TemporaryDirectory() as temporary, console.status("") as status:
        extent = Extent(one_rate=quick, one_seed=quick)
        names = list(chosen)
        arguments = (str(size), str(match), budget or "", str(seeds or ""), *(equal or ()), *chosen)
        if seconds is not None:
            planned = plan_tasks(Path(temporary), settings, chosen, candidates, match, extent, status.update)
            extent, names = _read_extent(folder, arguments) or _fit_to_budget(planned, seconds, jobs, console)
        notes = left_out(extent, names, list(chosen))
        chosen = {name: chosen[name] for name in names}
        study_folder = Path(temporary) if dry_run else folder
        planned = plan_tasks(study_folder, settings, chosen, candidates, match, extent, status.update)
    words = [*(mixers or ()), *([f"--tasks={tasks}"] if tasks else ()), f"--match={match}", f"--size={size}"]
    words += [*([f"--budget={budget}"] if budget else ()), *([] if seeds is None else [f"--seeds={seeds}"])]
    words += [f"--equal={each}" for each in equal or ()]
    words += [*(["--quick"] if quick else ()), *(() if references else ("--no-references",))]
    words += () if published else ("--no-published",)
    command = f"seqmix suite {shlex.join(words)}"
    output_options = [*(["--out", str(out)] if out else ()), *jobs_option]
    resume_command = shlex.join(
        ["seqmix", "suite", *words, *output_options, *(f"--beside={path}" for path in beside or ())]
    )
    scores = new_scores(size, match, command, notes, planned)
    if earlier is not None:
        earlier = comparable(scores, earlier)
        others.insert(0, earlier)
    for other in others:
        merge(scores, other)  # refuses scores that are not comparable, before anything is trained
    if dry_run:
        _show_plan(planned, notes, console)
        known = {row.entry for other in others for task in other.tasks.values() for row in task.rows} - {*by_name}
        if known:
            console.print(f"Beside these stand rows that need no training: {', '.join(sorted(known))}.", soft_wrap=True)
        return SuitePlan({task.name: [run.name for run in task.plan.runs] for task in planned}, list(notes))
    if budget is not None:
        _write_extent(folder, arguments, extent, tuple(chosen))
    runs = sum(len(task.plan.runs) for task in planned)
    console.print(
        f"{runs} runs of {', '.join(by_name)} on {len(planned)} tasks, {jobs} at once, in {folder}. Reduce them with "
        "--quick, --budget 10m or --tasks NAME; show them with --dry-run; stop with Ctrl-C, and resume with the same "
        "command",
        soft_wrap=True,
    )
    failed = 0
    merged = scores
    for number, task in enumerate(planned):
        later_flops = sum(run.flops for other in planned[number + 1 :] for run in other.plan.runs)
        console.print(f"{task.name}, task {number + 1} of {len(planned)}: {task.task.measures}")
        with _TaskProgress(console, later_flops) as progress:
            results, outcome = run_study(task.plan, folder / task.name, jobs=jobs, observer=progress)
        scores.tasks[task.name] = task_scores(task, results)
        failed += len(outcome.failed)
        merged = reduce(merge, others, scores)
        write_scores(merged, folder)
        if outcome.stopped:
            console.print(f"stopped with a checkpoint of every run; resume with: {resume_command}")
            return Ended(SuiteResult(str(folder), failed, merged), 130)
    headers, rows = score_table(merged)
    console.print(plain_table(*headers, rows=rows, overflow="fold"))
    headers, rows = accessory_table(merged)
    if rows:
        console.print("what else differs between the mixers:")
        console.print(plain_table(*headers, rows=rows, overflow="fold"))
    for sentence in (ORDER, uncertainty(merged), *merged.notes, *_describe_missing_scores(merged.tasks)):
        console.print(sentence, soft_wrap=True)
    console.print(f"{folder} has {PAGE_FILE}, {SCORES_FILE} and a folder with the report of each task")
    if failed:
        console.print(f"{failed} runs failed; retry them with: {resume_command}")
        return Ended(SuiteResult(str(folder), failed, merged), 1)
    return SuiteResult(str(folder), failed, merged)


def _published(size: Size, match: Metric, tasks: Sequence[str]) -> list[Scores]:
    """Return the published scores of tasks; none if there are none of this size and matching."""
    if not (PUBLISHED / f"{size}-{match}.json").is_file():
        return []
    scores = read_scores(Path(f"{size}-{match}"))
    return [scores.model_copy(update={"tasks": {name: scores.tasks[name] for name in tasks if name in scores.tasks}})]


def _known(entry: str, tasks: Sequence[str], scores: Sequence[Scores]) -> bool:
    """True if scores have a row of an entry for every task."""
    return all(
        any(row.entry == entry for each in scores if name in each.tasks for row in each.tasks[name].rows)
        for name in tasks
    )


def _all_kinds() -> list[str]:
    """Return the kinds that `all` stands for: every built-in mixer without required options."""
    set_by_study = {"kind", "n_heads"}
    kinds = []
    for kind, mixer in MIXERS.built_in().items():
        required = {name for name, field in mixer.model_fields.items() if field.is_required()}
        if required <= set_by_study:
            kinds.append(kind)
    return kinds


class _TaskProgress(StudyProgress):
    """Progress of one task; its remaining time includes the later tasks."""

    def __init__(self, console: Console, later_flops: float) -> None:
        super().__init__(console)
        self.later_flops = later_flops
        """FLOPs of the later tasks."""

    def begin(self, runs: Sequence[PlannedRun], total: int) -> None:
        """Start, and count the later tasks as one run that has not started."""
        super().begin(runs, total)
        self.forecast.weights["later tasks"] = self.later_flops


def _fit_to_budget(
    planned: Sequence[PlannedTask], budget: float, jobs: int, console: Console
) -> tuple[Extent, list[str]]:
    """Time a few steps of every run; return extent and tasks that fit into a budget (seconds) with `jobs` at once."""
    console.print("timing a few steps of every run")
    rates = {task.name: len(task.task.learning_rates) for task in planned}
    seeds = len(planned[0].plan.study.seeds)
    extent, names, seconds = fit(time_runs(planned), rates, seeds, budget * jobs)
    at_once = f" with {jobs} runs at once ({seconds / 60:.1f} core-minutes)" if jobs > 1 else ""
    console.print(f"{', '.join(names)}: about {seconds / jobs / 60:.1f} minutes{at_once}, if nothing else runs")
    return extent, names


def _equal_options(assignments: Sequence[str]) -> dict[str, Any]:
    """Parse the values of --equal, such as short_conv=4."""
    options = {}
    for each in assignments:
        name, equals_sign, text = each.partition("=")
        if not equals_sign or not name:
            raise SeqmixError(f"expected --equal OPTION=VALUE, such as short_conv=4, got {each!r}")
        node = parse(text, f"--equal {name}")
        options[name] = None if node is None else node.plain()
    return options


def _read_extent(folder: Path, arguments: Sequence[str]) -> tuple[Extent, list[str]] | None:
    """Read the extent and the tasks of an earlier call with the same arguments, so that rows stay comparable.

    Returns:
        The extent and the names of the tasks; None if there was no such call.
    """
    file = folder / EXTENT_FILE
    if not file.is_file() or (saved := load(_SavedExtent, file, presets=folder)).arguments != tuple(arguments):
        return None
    return Extent(saved.steps, saved.untuned, saved.one_seed), list(saved.tasks)


def _write_extent(folder: Path, arguments: tuple[str, ...], extent: Extent, tasks: tuple[str, ...]) -> None:
    steps, untuned, one_seed = astuple(extent)
    saved = _SavedExtent(arguments=arguments, steps=steps, untuned=untuned, one_seed=one_seed, tasks=tasks)
    write_file(dump(saved), folder / EXTENT_FILE)


def _show_plan(planned: Sequence[PlannedTask], notes: Sequence[str], console: Console) -> None:
    """Print the tasks with their runs and costs, and the mixers that are left out."""
    rows = [
        (
            task.name,
            str(len(task.plan.runs)),
            f"{task.plan.runs[0].config.training.steps:,}",
            f"{min(entry.cost.parameters for entry in task.plan.entries):,}",
            f"{si(sum(run.flops for run in task.plan.runs))}FLOP",
            ", ".join(f"{rate:g}" for rate in task.task.learning_rates),
            ", ".join(entry.name for entry in task.plan.entries),
        )
        for task in planned
    ]
    heads = ("task", "runs", "steps", "parameters", "cost", "learning rates", "mixers")
    console.print(plain_table(*heads, rows=rows, overflow="fold"))
    for task in planned:
        for name, reason in task.left_out.items():
            console.print(f"{task.name} leaves out {name}: {reason}", soft_wrap=True)
    for sentence in notes:
        console.print(sentence, soft_wrap=True)


def _describe_missing_scores(tasks: dict[str, TaskScores]) -> list[str]:
    """Return one sentence for each mixer that a task leaves out."""
    return [
        f"{name} has no score of {entry}: {reason}"
        for name, task in tasks.items()
        for entry, reason in task.left_out.items()
    ]
