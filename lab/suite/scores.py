"""Scores of the suite: a row per task and mixer, merging with the rows of other calls, and tables."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Literal

from pydantic import Field, ValidationError

from ...registry import Config, DataError, SeqmixError, nearest_hint, read_bytes
from ...registry.yaml import write as to_yaml
from ..study.confounders import ACCESSORIES, describe
from ..study.results import AccuracyBy, Machine, Results, RunResult, Statistic
from ..study.summary import statistic
from .tasks import Metric, PlannedTask, Size, SuiteTask

SCORES_FILE = "suite.json"
PAGE_FILE = "suite.md"
PUBLISHED = Path(__file__).with_name("results")
"""Folder of the scores behind docs/leaderboard.md: a file for each size and kind of matching."""


class ScoreRow(Config):
    """Score of an entry on a task, at its best learning rate."""

    entry: str
    mixers: tuple[str, ...]
    """Distinct kinds of mixers."""
    score: Statistic
    """Mean accuracy at the scored difficulties; statistics over seeds."""
    scores: dict[str, float] = Field(default_factory=dict)
    """Mean accuracy at the scored difficulties by seed; empty in files of older versions."""
    halfway: dict[str, float] = Field(default_factory=dict)
    """Accuracy over all difficulties after half of the steps, by seed; empty in files of older versions."""
    accessories: dict[str, str] = Field(default_factory=dict)
    """Accessories of the mixers, such as short_conv; empty in files of older versions."""
    accuracy_by: AccuracyBy
    """Accuracy by difficulty, averaged over seeds."""
    learning_rate: float
    parameters: int
    state_bytes: int
    """State bytes of one sequence at the training length."""
    state_grows: bool
    """True if the state grows with the sequence."""
    machine: Machine = Machine()
    """Machine and versions that computed the row."""


class Conditions(Config):
    """Conditions that all rows of a task share; only rows with equal conditions can be compared."""

    data: str
    """Fields of the data that differ from the defaults, in YAML."""
    training: str
    """Fields of the training that differ from the defaults, in YAML."""
    learning_rates: tuple[float, ...]
    """Learning rates of which the best is chosen for each mixer; a single one if they are not tuned."""
    tuning_seeds: tuple[int, ...] = ()
    """Seeds of the tuning runs; none without tuning."""
    seeds: tuple[int, ...]
    matched: str
    """Cost that is matched, its target, and the knob."""
    equal: str = ""
    """Options set to the same value in all mixers, as YAML."""


class TaskScores(Config):
    """A task and its rows."""

    task: SuiteTask
    conditions: Conditions
    rows: tuple[ScoreRow, ...] = ()
    left_out: dict[str, str] = Field(default_factory=dict)
    """Reasons for entries without a score, by entry."""


class Scores(Config):
    """Scores of the suite, as stored in suite.json."""

    format: Literal[1] = 1
    size: Size
    match: Metric
    created: str
    """Date and time in ISO 8601, UTC."""
    commands: tuple[str, ...]
    """Commands that computed the scores."""
    notes: tuple[str, ...] = ()
    """Sentences on the parts of the suite that were left out."""
    tasks: dict[str, TaskScores]


def task_scores(planned: PlannedTask, results: Results) -> TaskScores:
    """Return the scores of one task from the results of its study."""
    rows = []
    configs = {entry.name: entry.config for entry in planned.plan.entries}
    for summary in results.summary:
        by_seed = {str(run.seed): _score(run, planned.task) for run in results.runs_of(summary)}
        features = describe(configs[summary.entry])
        entry = results.entry_of(summary)
        rows.append(
            ScoreRow(
                entry=summary.entry,
                mixers=entry.mixers,
                score=statistic(list(by_seed.values())),
                scores=by_seed,
                halfway=halfway(results.runs_of(summary)),
                accessories={name: features[name].text for name in ACCESSORIES},
                accuracy_by={
                    name: {key: value.mean for key, value in by.items()} for name, by in summary.accuracy_by.items()
                },
                learning_rate=summary.learning_rate,
                parameters=entry.parameters,
                state_bytes=entry.state_bytes,
                state_grows=entry.state_grows,
                machine=results.machine,
            )
        )
    failed = {run.entry: run.error or "it was stopped" for run in results.runs if run.status != "finished"}
    scored = {row.entry for row in rows}
    return TaskScores(
        task=planned.task,
        conditions=conditions_of(planned),
        rows=tuple(rows),
        left_out={**planned.left_out, **{name: why for name, why in failed.items() if name not in scored}},
    )


def halfway(runs: Iterable[RunResult]) -> dict[str, float]:
    """Return the accuracy of each run after half of its steps, by seed, where it was evaluated then."""
    return {
        str(run.seed): each.accuracy
        for run in runs
        for each in run.evaluations
        if each.accuracy is not None and 2 * each.step == run.evaluations[-1].step
    }


def conditions_of(planned: PlannedTask) -> Conditions:
    """Return the conditions of a planned task."""
    config = planned.plan.runs[0].config
    study = planned.plan.study
    match = study.match
    rates = (config.training.learning_rate,) if study.tune is None else study.tune.learning_rate
    training = config.training.model_copy(update={"learning_rate": rates[0]})
    return Conditions(
        data=_changed_fields({"kind": config.data.kind}, config.data),
        training=_changed_fields({}, training),
        learning_rates=rates,
        tuning_seeds=study.tuning_seeds,
        seeds=study.seeds,
        matched="" if match is None else f"{match.metric} {match.wanted:,} by {match.knob}",
        equal=to_yaml(study.equal, in_one_line=True).strip() if study.equal else "",
    )


def _changed_fields(always: dict[str, str], config: Config) -> str:
    """Return a configuration's fields that differ from the defaults, and those in `always`, in YAML.

    Defaults are left out so that scores stay comparable when a later version adds a field.
    """
    return to_yaml(always | config.model_dump(mode="json", exclude_defaults=True))


def _score(run: RunResult, task: SuiteTask) -> float:
    (by,) = run.accuracy_by.values()
    return mean(by[key] for key in task.score_at or by)


def new_scores(size: Size, match: Metric, command: str, notes: Sequence[str], planned: Sequence[PlannedTask]) -> Scores:
    """Return scores of the planned tasks without any rows, created now."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    tasks = {each.name: TaskScores(task=each.task, conditions=conditions_of(each)) for each in planned}
    return Scores(size=size, match=match, created=created, commands=(command,), notes=tuple(notes), tasks=tasks)


def merge(one: Scores, other: Scores) -> Scores:
    """Merge two scores; for an entry in both, the first's row is kept.

    Raises:
        SeqmixError: sizes, matching or conditions differ, so that rows cannot be compared.
    """
    if (one.size, one.match) != (other.size, other.match):
        raise SeqmixError(
            f"expected scores with {one.size} settings at equal {one.match}, got {other.size} settings at equal "
            f"{other.match}: such rows cannot share a table"
        )
    tasks = dict(one.tasks)
    for name, theirs in other.tasks.items():
        ours = tasks.get(name, theirs)
        for field in Conditions.model_fields:
            if getattr(ours.conditions, field) != getattr(theirs.conditions, field):
                raise SeqmixError(f"rows of {name} cannot share a table: their {field.replace('_', ' ')} differ")
        entries = {row.entry for row in ours.rows}
        rows = (*ours.rows, *(row for row in theirs.rows if row.entry not in entries))
        left_out = {k: v for k, v in (theirs.left_out | ours.left_out).items() if k not in {row.entry for row in rows}}
        tasks[name] = ours.model_copy(update={"rows": rows, "left_out": left_out})
    commands = tuple(dict.fromkeys((*one.commands, *other.commands)))
    notes = tuple(dict.fromkeys((*one.notes, *other.notes)))
    return one.model_copy(update={"commands": commands, "notes": notes, "tasks": tasks})


def comparable(one: Scores, other: Scores) -> Scores:
    """Return `other` without the tasks whose conditions differ from those in `one`."""
    tasks = {
        name: task
        for name, task in other.tasks.items()
        if name not in one.tasks or one.tasks[name].conditions == task.conditions
    }
    return other.model_copy(update={"tasks": tasks})


def read_scores(path: Path) -> Scores:
    """Read scores: `path` is a suite.json, a folder with one, or the name of published results.

    Raises:
        SeqmixError: the file does not exist or does not hold scores.
    """
    published = PUBLISHED / f"{path}.json"
    file = path / SCORES_FILE if path.is_dir() else path if path.is_file() or not published.is_file() else published
    try:
        return Scores.model_validate_json(read_bytes(file))
    except OSError as error:
        names = sorted(each.stem for each in PUBLISHED.glob("*.json"))
        raise DataError(
            f"{file} cannot be read: {error.strerror}; expected {SCORES_FILE}, a folder with one, or published scores: "
            f"{', '.join(names)}{nearest_hint(str(path), names)}"
        ) from None
    except ValidationError as error:
        raise DataError(f"{file} does not hold scores of the suite: {error.errors()[0]['msg']}") from None
