"""What the suite found: a row per task and mixer, which other calls' rows can stand beside, and a table."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Literal

from pydantic import Field, ValidationError

from ...registry import Config, SeqmixError, read_bytes, write_file
from ...registry.yaml import write as to_yaml
from ..pages import table
from ..report import REPORT_FILE
from ..results import AccuracyBy, Machine, Results, RunResult, Statistic
from ..summary import statistic
from .tasks import Metric, PlannedTask, Size, SuiteTask

SCORES_FILE = "suite.json"
PAGE_FILE = "suite.md"
PUBLISHED = Path(__file__).with_name("results")
"""What docs/leaderboard.md is made from: a file for each size and matching."""


class ScoreRow(Config):
    """An entry on a task, at its best learning rate."""

    entry: str
    mixers: tuple[str, ...]
    """Kinds, once each."""
    score: Statistic
    """Accuracy at the difficulties that count, over seeds."""
    accuracy_by: AccuracyBy
    """Means over seeds, by difficulty."""
    learning_rate: float
    parameters: int
    state_bytes: int
    """Of one sequence, after as many tokens as it has in training."""
    state_grows: bool
    machine: Machine = Machine()
    """What computed it, and with which versions."""


class Conditions(Config):
    """What is the same for all rows of a task: rows of other conditions do not stand beside them."""

    data: str
    """What is not the default, in YAML; so is the training."""
    training: str
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    matched: str
    """What is made equal, and to what."""


class TaskScores(Config):
    """A task and its rows."""

    task: SuiteTask
    conditions: Conditions
    rows: tuple[ScoreRow, ...] = ()
    left_out: dict[str, str] = Field(default_factory=dict)
    """Entries without a figure, and why."""


class Scores(Config):
    """All that was found."""

    format: Literal[1] = 1
    size: Size
    match: Metric
    created: str
    """ISO 8601, UTC."""
    commands: tuple[str, ...]
    """That computed it."""
    notes: tuple[str, ...] = ()
    """What was left out, a sentence each."""
    tasks: dict[str, TaskScores]


def task_scores(planned: PlannedTask, results: Results) -> TaskScores:
    """The rows of one task, from its study's results."""
    rows = []
    for found in results.summary:
        runs = [
            run
            for run in results.runs
            if (run.entry, run.learning_rate, run.status) == (found.entry, found.learning_rate, "finished")
        ]
        entry = results.entry_of(found)
        rows.append(
            ScoreRow(
                entry=found.entry,
                mixers=entry.mixers,
                score=statistic([_score(run, planned.task) for run in runs]),
                accuracy_by={
                    name: {key: value.mean for key, value in by.items()} for name, by in found.accuracy_by.items()
                },
                learning_rate=found.learning_rate,
                parameters=entry.parameters,
                state_bytes=entry.state_bytes,
                state_grows=entry.state_grows,
                machine=results.machine,
            )
        )
    failed = {run.entry: run.error or "it was stopped" for run in results.runs if run.status != "finished"}
    there = {row.entry for row in rows}
    return TaskScores(
        task=planned.task,
        conditions=conditions_of(planned),
        rows=tuple(rows),
        left_out={**planned.left_out, **{name: why for name, why in failed.items() if name not in there}},
    )


def conditions_of(planned: PlannedTask) -> Conditions:
    """What all entries of a task share."""
    config = planned.plan.runs[0].config
    study = planned.plan.study
    match = study.match
    training = config.training.model_copy(update={"learning_rate": study.learning_rates[0]})
    return Conditions(
        data=_different({"kind": config.data.kind}, config.data),
        training=_different({}, training),
        learning_rates=study.learning_rates,
        seeds=study.seeds,
        matched="" if match is None else f"{match.metric} {match.wanted:,} by {match.knob}",
    )


def _different(more: dict[str, str], config: Config) -> str:
    """What of a configuration is not the default, in YAML: a field that is added later changes nothing."""
    return to_yaml(more | config.model_dump(mode="json", exclude_defaults=True))


def _score(run: RunResult, task: SuiteTask) -> float:
    (by,) = run.accuracy_by.values()
    return mean(by[key] for key in task.score_at or by)


def new_scores(size: Size, match: Metric, command: str, notes: Sequence[str], planned: Sequence[PlannedTask]) -> Scores:
    """Scores of now, without rows yet."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    tasks = {each.name: TaskScores(task=each.task, conditions=conditions_of(each)) for each in planned}
    return Scores(size=size, match=match, created=created, commands=(command,), notes=tuple(notes), tasks=tasks)


def merge(one: Scores, other: Scores) -> Scores:
    """Rows of both, where a name is in both those of the first.

    Raises:
        SeqmixError: a task has other conditions in them: then rows cannot be compared.
    """
    if (one.size, one.match) != (other.size, other.match):
        raise SeqmixError(
            f"{one.size} settings at equal {one.match} and {other.size} at equal {other.match} cannot stand in one "
            "table"
        )
    tasks = dict(one.tasks)
    for name, theirs in other.tasks.items():
        ours = tasks.get(name, theirs)
        for field in Conditions.model_fields:
            if getattr(ours.conditions, field) != getattr(theirs.conditions, field):
                raise SeqmixError(f"rows of {name} cannot stand in one table: their {field.replace('_', ' ')} differ")
        own = {row.entry for row in ours.rows}
        rows = (*ours.rows, *(row for row in theirs.rows if row.entry not in own))
        left_out = {k: v for k, v in (theirs.left_out | ours.left_out).items() if k not in {row.entry for row in rows}}
        tasks[name] = ours.model_copy(update={"rows": rows, "left_out": left_out})
    commands = tuple(dict.fromkeys((*one.commands, *other.commands)))
    notes = tuple(dict.fromkeys((*one.notes, *other.notes)))
    return one.model_copy(update={"commands": commands, "notes": notes, "tasks": tasks})


def comparable(one: Scores, other: Scores) -> Scores:
    """The second's tasks, but those that have other conditions in the first."""
    tasks = {
        name: task
        for name, task in other.tasks.items()
        if name not in one.tasks or one.tasks[name].conditions == task.conditions
    }
    return other.model_copy(update={"tasks": tasks})


def read_scores(path: Path) -> Scores:
    """Read suite.json, that of a folder, or published results, by name.

    Raises:
        SeqmixError: it is not there, or is something else.
    """
    published = PUBLISHED / f"{path}.json"
    file = path / SCORES_FILE if path.is_dir() else path if path.is_file() or not published.is_file() else published
    try:
        return Scores.model_validate_json(read_bytes(file))
    except OSError as error:
        raise SeqmixError(f"{file} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise SeqmixError(f"{file} does not hold scores of the suite: {error.errors()[0]['msg']}") from None


def score_table(scores: Scores) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows of the tasks that have figures: accuracies in percent, best mean first, and guessing at the end.

    A task with variations is one column, the mean over all of them. An entry without a figure in each of them has none
    there, and none of the mean unless it has one in every task.
    """
    tasks = {name: task for name, task in scores.tasks.items() if task.rows and task.task.varies is None}
    found: dict[str, dict[str, Statistic]] = {}
    for name in tasks:
        parts = [task for key, task in scores.tasks.items() if name in (key, task.task.varies)]
        for row in tasks[name].rows:
            figures = [other.score for part in parts for other in part.rows if other.entry == row.entry]
            if len(figures) == len(parts):
                found.setdefault(row.entry, {})[name] = _over(figures)

    def average(entry: str) -> float | None:
        return mean(value.mean for value in found[entry].values()) if len(found[entry]) == len(tasks) else None

    ranked = sorted(found, key=lambda entry: -(average(entry) or 0.0))
    rows = [
        (entry, *(_percent(found[entry].get(name)) for name in tasks), _percent(average(entry))) for entry in ranked
    ]
    guess = [task.task.chance for task in tasks.values()]
    guesses = ("(guessing)", *map(_percent, guess), _percent(mean(guess) if guess else None))
    return ["entry", *tasks, "mean"], [*rows, guesses]


def _over(figures: Sequence[Statistic]) -> Statistic:
    """The mean over variations; their spreads are independent."""
    spreads = [figure.spread for figure in figures if figure.spread is not None]
    spread = math.hypot(*spreads) / len(figures) if len(spreads) == len(figures) else None
    return Statistic(mean=mean(figure.mean for figure in figures), spread=spread)


def _percent(value: Statistic | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, Statistic):
        return _percent(value.mean) + ("" if value.spread is None else f" ± {100 * value.spread:.1f}")
    return f"{100 * value:.1f}"


def markdown(scores: Scores, *, reports: bool = True) -> list[str]:
    """The lines of a page: the table, what each task is, what was left out, how to compute it again.

    Args:
        scores: what was found.
        reports: whether the reports of the tasks' studies lie beside the page.
    """
    head, rows = score_table(scores)
    lines = [*table([head[0], *(f"{name}:" for name in head[1:])], rows), ""]
    spread = any(row.score.spread is not None for task in scores.tasks.values() for row in task.rows)
    seeds = ", mean ± standard deviation over seeds" if spread else ""
    lines += [f"Accuracy in percent{seeds}; equal {scores.match}; best mean first.", ""]
    for name, task in scores.tasks.items():
        at = f", at {' and '.join(task.task.score_at)}" if task.task.score_at else ""
        link = f"[**{name}**]({name}/{REPORT_FILE})" if reports else f"**{name}**"
        same = task.conditions
        seeds, rates = (", ".join(f"{value:g}" for value in values) for values in (same.seeds, same.learning_rates))
        lines.append(
            f"- {link}: {task.task.measures}{at} ({task.task.source}). Seeds {seeds}; learning rates {rates}; "
            f"{same.matched}."
        )
        lines += [f"  Not the published settings: {task.task.differs}."] if task.task.differs else []
        for entry, why in task.left_out.items():
            lines.append(f"  Without a figure: {why if why.startswith(entry) else f'{entry}: {why}'}.")
    lines += ["", *scores.notes, ""] if scores.notes else [""]
    machines = dict.fromkeys(
        f"seqmix {row.machine.seqmix}{f' ({row.machine.commit[:7]})' if row.machine.commit else ''}, "
        f"torch {row.machine.torch}, {row.machine.processor}"
        for task in scores.tasks.values()
        for row in task.rows
    )
    lines += [f"Computed by {'; '.join(machines)}, {scores.created[:10]}:", "", "```text", *scores.commands, "```"]
    return lines


def write_scores(scores: Scores, folder: Path) -> None:
    """Write suite.json and suite.md."""
    write_file(scores.model_dump_json(indent=1) + "\n", folder / SCORES_FILE)
    write_file("\n".join([f"# The suite, {scores.size} settings", "", *markdown(scores)]) + "\n", folder / PAGE_FILE)
