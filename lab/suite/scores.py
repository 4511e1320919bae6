"""Scores of the suite: a row per task and mixer, merging with the rows of other calls, and tables."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError

from ...registry import Config, DataError, SeqmixError, nearest_hint, read_bytes, write_file
from ...registry.yaml import write as to_yaml
from ..markdown import table
from ..study.confounders import ACCESSORIES, describe
from ..study.report import REPORT_FILE
from ..study.results import AccuracyBy, Machine, Results, RunResult, Statistic
from ..study.summary import beyond_noise, statistic
from .tasks import Metric, PlannedTask, Size, SuiteTask

SCORES_FILE = "suite.json"
PAGE_FILE = "suite.md"
PUBLISHED = Path(__file__).with_name("results")
"""Folder of the scores behind docs/leaderboard.md: a file for each size and kind of matching."""
TIE = 0.01
"""Difference of accuracies below which two scores are tied, however sure it is: seeds that all have nearly all right
differ by single answers, with an interval of width 0."""
UNKNOWN = 0.1
"""Half the width of the interval of a difference from which a tie says little: the seeds have all or nothing."""


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


def score_table(scores: Scores) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return heads and rows of the score table: accuracies in percent, best mean first, chance level last.

    A task with variations is one column, the mean over all of them; an entry needs a score in each. The mean over tasks
    is given for entries with a score in every task. A star marks the best of a column and those tied with it, a
    question mark those that may be tied.
    """
    tasks = {name: task for name, task in scores.tasks.items() if task.rows and task.task.varies is None}
    columns: dict[str, dict[str, _Cell]] = {}
    for name in tasks:
        parts = [task for key, task in scores.tasks.items() if name in (key, task.task.varies)]
        for row in tasks[name].rows:
            cells = [
                _Cell(other.score, other.scores) for part in parts for other in part.rows if other.entry == row.entry
            ]
            if len(cells) == len(parts):
                columns.setdefault(name, {})[row.entry] = _average(cells)
    entries = dict.fromkeys(entry for column in columns.values() for entry in column)
    whole = {
        entry: _average([column[entry] for column in columns.values()])
        for entry in entries
        if all(entry in columns.get(name, {}) for name in tasks)
    }
    ranked = sorted(entries, key=lambda entry: -(whole[entry].score.mean if entry in whole else 0.0))
    texts = [_marked(column) for column in (*(columns.get(name, {}) for name in tasks), whole)]
    rows = [(entry, *(text.get(entry, "") for text in texts)) for entry in ranked]
    chances = [task.task.chance for task in tasks.values()]
    guessing = ("(guessing)", *map(_percent, chances), _percent(mean(chances) if chances else None))
    return ["entry", *tasks, "mean"], [*rows, guessing]


class _Cell(NamedTuple):
    """A score, and that of each seed as far as it is known."""

    score: Statistic
    by_seed: Mapping[str, float]


def _average(cells: Sequence[_Cell]) -> _Cell:
    """Return the mean of scores; if all have the same seeds, also the mean of each seed, which gives an interval."""
    seeds = cells[0].by_seed
    if not seeds or any(cell.by_seed.keys() != seeds.keys() for cell in cells):
        return _Cell(Statistic(mean=mean(cell.score.mean for cell in cells)), {})
    by_seed = {seed: mean(cell.by_seed[seed] for cell in cells) for seed in seeds}
    return _Cell(statistic(list(by_seed.values())), by_seed)


def _marked(column: Mapping[str, _Cell]) -> dict[str, str]:
    """Return the texts of a column, with a mark at the best score and at those tied with it."""
    best = max(column.values(), key=lambda cell: cell.score.mean, default=None)
    ranked = all(len(cell.by_seed) > 1 for cell in column.values()) and len(column) > 1
    return {
        entry: _percent(cell.score) + (_mark(best, cell) if best is not None and ranked else "")
        for entry, cell in column.items()
    }


def _mark(best: _Cell, other: _Cell) -> str:
    """Return the mark of a score that is tied with the best, of one that may be, and of one that is not."""
    apart = paired_difference(best.by_seed, other.by_seed)
    if apart is None or apart.margin is None:
        return ""
    if abs(apart.mean) >= TIE and beyond_noise(apart):
        return ""
    margin = best.score.margin if other is best else apart.margin
    return " *" if margin is None or margin <= UNKNOWN else " ?"


def paired_difference(one: Mapping[str, float], other: Mapping[str, float]) -> Statistic | None:
    """Return the mean of one minus other at equal seeds, with its interval; None without a common seed."""
    differences = [value - other[seed] for seed, value in one.items() if seed in other]
    return statistic(differences) if differences else None


def _percent(value: Statistic | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, Statistic):
        return _percent(value.mean) + ("" if value.margin is None else f" ± {100 * value.margin:.1f}")
    return f"{100 * value:.1f}"


def accessory_table(scores: Scores) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return heads and rows of a table of the mixers' accessories; no rows if all have the same ones."""
    known = {row.entry: row.accessories for task in scores.tasks.values() for row in task.rows if row.accessories}
    differing = [name for name in ACCESSORIES if len({each.get(name) for each in known.values()}) > 1]
    if not differing:
        return [], []
    return ["entry", *differing], [
        (entry, *(each.get(name, "") for name in differing)) for entry, each in known.items()
    ]


def uncertainty(scores: Scores) -> str:
    """Return a sentence on what intervals and stars mean."""
    if any(row.score.margin is not None for task in scores.tasks.values() for row in task.rows):
        return (
            "± is half the width of the 95 % t interval over seeds. A star marks the best of a column and those tied "
            f"with it: their differences from it at equal seeds are below {100 * TIE:g} point, or have a 95 % t "
            f"interval that contains 0. With a question mark, this interval, or that of the best itself, is wider than "
            f"{200 * UNKNOWN:g} points."
        )
    return "There is one seed, so there are no intervals and no ranking: differences may be chance."


def markdown(scores: Scores) -> list[str]:
    """Return the lines of a page: the table, the tasks, the parts left out, and the commands to reproduce it."""
    lines = [*score_lines(scores), ""]
    lines += [f"Accuracy in percent; equal {scores.match}; best mean first. {uncertainty(scores)}", ""]
    heads, rows = accessory_table(scores)
    if rows:
        lines += ["The mixers also differ in their accessories, so no score is that of a mixer's equations alone:", ""]
        lines += [*table(heads, rows), ""]
    return [*lines, *condition_lines(scores)]


def score_lines(scores: Scores) -> list[str]:
    """Return the lines of the score table."""
    head, rows = score_table(scores)
    return table([head[0], *(f"{name}:" for name in head[1:])], rows)


def condition_lines(scores: Scores, *, reports: bool = True) -> list[str]:
    """Return the lines of the tasks with their conditions, the parts left out, and what computed them.

    Args:
        scores: the scores to describe.
        reports: True to link the reports of the tasks' studies, which must lie beside the page, and to show the
            commands that made them.
    """
    lines: list[str] = []
    for name, task in scores.tasks.items():
        at = f", at {' and '.join(task.task.score_at)}" if task.task.score_at else ""
        link = f"[**{name}**]({name}/{REPORT_FILE})" if reports else f"**{name}**"
        conditions = task.conditions
        seeds = ", ".join(f"{seed:g}" for seed in conditions.seeds)
        rates = ", ".join(f"{rate:g}" for rate in conditions.learning_rates)
        tuned = f"learning rate {rates}"
        if conditions.tuning_seeds:
            tuned = f"learning rate tuned ({rates}; seeds {', '.join(map(str, conditions.tuning_seeds))})"
        equal = f"; equal in all mixers: {conditions.equal}" if conditions.equal else ""
        lines.append(
            f"- {link}: {task.task.measures}{at} ({task.task.source}). Seeds {seeds}; {tuned}; "
            f"{conditions.matched}{equal}."
        )
        lines += [f"  Differs from the published settings: {task.task.differs}."] if task.task.differs else []
        for entry, why in task.left_out.items():
            lines.append(f"  No score: {why if why.startswith(entry) else f'{entry}: {why}'}.")
    lines += ["", *scores.notes, ""] if scores.notes else [""]
    machines = dict.fromkeys(
        f"seqmix {row.machine.seqmix}{f' ({row.machine.commit[:7]})' if row.machine.commit else ''}, "
        f"torch {row.machine.torch}, {row.machine.processor}"
        for task in scores.tasks.values()
        for row in task.rows
    )
    computed = f"Computed with {'; '.join(machines)}, {scores.created[:10]}"
    return [*lines, *([f"{computed}:", "", "```text", *scores.commands, "```"] if reports else [f"{computed}."])]


def write_scores(scores: Scores, folder: Path) -> None:
    """Write suite.json and suite.md into a folder."""
    write_file(scores.model_dump_json(indent=1) + "\n", folder / SCORES_FILE)
    write_file("\n".join([f"# The suite, {scores.size} settings", "", *markdown(scores)]) + "\n", folder / PAGE_FILE)
