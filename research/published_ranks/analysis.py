"""Scores of the suite against published rankings."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from ...lab.suite.leaderboard import LeaderboardEntry
from ...lab.suite.scores import ScoreRow, Scores
from ...registry import SeqmixError
from . import ranks
from .grids import Grid, Measure
from .predictions import DATE, Prediction, Predictions
from .ranks import Array, Column, Interval

MINIMUM = 4
"""Smallest number of entries of a column that takes part: a ranking of three says almost nothing."""


class Predictor(NamedTuple):
    """Scores by which entries are ranked: of one task, or of several together."""

    name: str
    entries: tuple[str, ...]
    by_seed: Array
    """Scores, [tasks, seeds, entries]; one seed if seeds are not known or not shared."""

    @property
    def values(self) -> Array:
        """Values by which the entries are ranked, `ranks.combined`, [entries]."""
        return ranks.combined(self.by_seed)

    def without(self, left_out: set[str]) -> "Predictor":
        """Return the predictor without some entries."""
        kept = [i for i, entry in enumerate(self.entries) if entry not in left_out]
        return Predictor(self.name, tuple(self.entries[i] for i in kept), self.by_seed[..., kept])


class Published(NamedTuple):
    """Published column together with its origin."""

    grid: str
    measure: str
    column: Column


class Pooled(NamedTuple):
    """Agreement of a predictor with published columns, pooled over papers."""

    rho: float
    interval: Interval
    p: float
    papers: int
    entries: int


def task_predictors(
    scores: Scores, entries: Mapping[str, LeaderboardEntry], *, halfway: bool = False
) -> dict[str, Predictor]:
    """Return a predictor for each task of the suite, with those entries of leaderboard.yaml that have a score.

    Scores are rounded to whole percents: smaller differences, as between mixers that have all right, are noise. With
    `halfway`, they are the accuracies after half of the training, of those entries that have them.

    Raises:
        SeqmixError: a row has the name of an entry and another mixer.
    """
    predictors = {}
    for name, task in scores.tasks.items():
        rows = [row for row in task.rows if row.entry in entries and (row.halfway or not halfway)]
        rows.sort(key=lambda row: row.entry)  # random draws go by position: rows in another order change no interval
        for row in rows:
            if row.mixers != (entries[row.entry].kind,):
                raise SeqmixError(
                    f"{name}: expected the mixer {entries[row.entry].kind} in the row {row.entry}, as in "
                    f"leaderboard.yaml, got {', '.join(row.mixers)}: rename the row"
                )
        if rows and task.task.varies is None:
            predictors[name] = Predictor(
                name, tuple(row.entry for row in rows), _by_seed(rows, halfway)[None].round(ranks.DIGITS)
            )
    return predictors


def _by_seed(rows: Sequence[ScoreRow], halfway: bool) -> Array:
    """Return the rows' scores at the seeds that all of them have, [seeds, rows]; their means if there is none."""
    scores = [row.halfway if halfway else row.scores for row in rows]
    seeds = [seed for seed in scores[0] if all(seed in each for each in scores)]
    if not seeds:
        return np.array([[row.score.mean for row in rows]])
    return np.array([[each[seed] for each in scores] for seed in seeds])


def group_predictors(tasks: Mapping[str, Predictor], groups: Mapping[str, Sequence[str]]) -> dict[str, Predictor]:
    """Return a predictor for each group whose tasks all have scores.

    A group has the entries with a score in every task. Where tasks have unequally many seeds, means over seeds stand
    for them.
    """
    predictors = {}
    for name, members in groups.items():
        if any(task not in tasks for task in members):
            continue
        parts = [tasks[task] for task in members]
        common = [entry for entry in parts[0].entries if all(entry in part.entries for part in parts)]
        values = [part.by_seed[..., [part.entries.index(entry) for entry in common]] for part in parts]
        if len({value.shape[1] for value in values}) > 1:
            values = [value.mean(1, keepdims=True) for value in values]
        predictors[name] = Predictor(name, tuple(common), np.concatenate(values))
    return predictors


def date_predictor(entries: Mapping[str, LeaderboardEntry], names: Sequence[str]) -> Predictor:
    """Return the predictor that ranks newer mixers higher."""
    return Predictor(DATE, tuple(names), np.array([[[entries[name].date for name in names]]]))


def columns_for(
    names: Sequence[str],
    grids: Mapping[str, Grid],
    select: Callable[[Measure], bool],
    *,
    without_own: bool = False,
) -> list[Published]:
    """Return the selected columns of the used grids, with the given entries, that have at least `MINIMUM` of them.

    `without_own` leaves out the models that a paper proposes, in that paper.
    """
    columns = []
    for grid_name, grid in grids.items():
        for measure in filter(lambda name: select(grid.measures[name]), grid.measures if grid.used else ()):
            values = grid.column(measure)
            left_out = grid.own_entries() if without_own else set()
            index = [i for i, name in enumerate(names) if name in values and name not in left_out]
            kept = np.array([values[names[i]] for i in index])
            if len(index) >= MINIMUM and len(set(kept)) > 1:
                paper = grid.arxiv or grid_name
                columns.append(Published(grid_name, measure, Column(paper, np.array(index), kept)))
    return columns


def pool(predictor: Predictor, published: Sequence[Published], draws: int = ranks.DRAWS) -> Pooled | None:
    """Return the agreement of a predictor with columns that were selected for its entries; None without columns."""
    if not published:
        return None
    columns = [each.column for each in published]
    return Pooled(
        rho=float(ranks.pooled(predictor.values, columns)),
        interval=ranks.pooled_interval(predictor.by_seed, columns, draws),
        p=ranks.pooled_p(predictor.values, columns, draws),
        papers=len({column.paper for column in columns}),
        entries=len({i for column in columns for i in column.positions.tolist()}),
    )


def minus_date(
    predictor: Predictor,
    published: Sequence[Published],
    entries: Mapping[str, LeaderboardEntry],
    draws: int = ranks.DRAWS,
) -> tuple[float, Interval] | None:
    """Return by how much a predictor's pooled rho exceeds that of the date, with its interval; None without columns."""
    if not published:
        return None
    columns = [each.column for each in published]
    date = date_predictor(entries, predictor.entries).values
    difference = float(ranks.pooled(predictor.values, columns) - ranks.pooled(date, columns))
    return difference, ranks.pooled_interval(predictor.by_seed, columns, draws, minus=date)


def about(subject: str) -> Callable[[Measure], bool]:
    """Return the selection of columns that ask for a subject."""
    return lambda measure: measure.asks == subject


def same_as(task: str) -> Callable[[Measure], bool]:
    """Return the selection of columns that ask the same as a task of the suite."""
    return lambda measure: measure.task == task


def reliability(predictor: Predictor) -> float | None:
    """Return the mean rho between two seeds of a task: what chance of training leaves of its ranking."""
    seeds = range(predictor.by_seed.shape[1])
    pairs = combinations([ranks.combined(predictor.by_seed[:, [seed]]) for seed in seeds], 2)
    rhos = [float(ranks.spearman(one, other)) for one, other in pairs]
    rhos = [rho for rho in rhos if not np.isnan(rho)]
    return sum(rhos) / len(rhos) if rhos else None


class Agreement(NamedTuple):
    """Agreement of published rankings with each other."""

    pairs: int
    """Pairs of columns of different papers with at least `MINIMUM` common entries."""
    rho: float | None
    """Mean rho of the pairs, weighted by their entries minus 1."""
    low: float | None
    high: float | None


def agreement(grids: Mapping[str, Grid], subject: str) -> Agreement:
    """Return how well the published columns of a subject agree across papers: the most that a task can hope for."""
    columns = [
        (grid.arxiv or name, grid.column(measure))
        for name, grid in grids.items()
        if grid.used
        for measure in grid.measures
        if grid.measures[measure].asks == subject
    ]
    rhos = []
    weights = []
    for (paper, one), (other_paper, other) in combinations(columns, 2):
        common = [entry for entry in one if entry in other]
        if paper != other_paper and len(common) >= MINIMUM:
            rho = ranks.spearman(np.array([one[e] for e in common]), np.array([other[e] for e in common]))
            if not np.isnan(rho):
                rhos.append(float(rho))
                weights.append(len(common) - 1)
    if not rhos:
        return Agreement(0, None, None, None)
    return Agreement(len(rhos), float(np.average(rhos, weights=weights)), min(rhos), max(rhos))


class Verdict(NamedTuple):
    """Outcome of a prediction."""

    prediction: Prediction
    pooled: Pooled | None
    """None if a task of the group, or every column, is missing."""
    corrected: float | None
    """p-value corrected by Holm's method for the number of predictions of a positive relation."""
    difference: Interval | None
    """Interval of the pooled rho minus the date's; for predictions against the date."""
    text: str


def judge(
    predictions: Predictions,
    groups: Mapping[str, Predictor],
    grids: Mapping[str, Grid],
    entries: Mapping[str, LeaderboardEntry],
    draws: int = ranks.DRAWS,
) -> list[Verdict]:
    """Judge all predictions."""
    measured: list[tuple[Prediction, Pooled | None, Interval | None]] = []
    for prediction in predictions.predictions:
        group = groups.get(prediction.predictor)
        if group is None:
            measured.append((prediction, None, None))
            continue
        published = columns_for(group.entries, grids, about(prediction.asks))
        difference = None
        if prediction.expect == "no better than date" and (found := minus_date(group, published, entries, draws)):
            difference = found[1]
        measured.append((prediction, pool(group, published, draws), difference))
    # what could not be measured counts among the tests too, as one that found nothing
    positive = [(i, pooled) for i, (each, pooled, _) in enumerate(measured) if each.expect == "positive"]
    tested = {i: 1.0 if pooled is None else pooled.p for i, pooled in positive}
    corrected = dict(zip(tested, ranks.holm(list(tested.values())), strict=True))
    return [
        Verdict(each, pooled, corrected.get(i), difference, _text(each, pooled, corrected.get(i), difference))
        for i, (each, pooled, difference) in enumerate(measured)
    ]


def _text(prediction: Prediction, pooled: Pooled | None, corrected: float | None, difference: Interval | None) -> str:
    """Return the verdict in words."""
    if pooled is None:
        return "not measured"
    low, high = pooled.interval
    if prediction.expect == "positive":
        if corrected is not None and corrected <= ranks.LEVEL:
            return "as predicted"
        return "the opposite" if high < 0 else "not distinguishable from chance"
    if prediction.expect == "none":
        return "not refuted" if low <= 0 <= high else "refuted: there is a relation"
    better = difference is not None and difference.low > 0
    return "refuted: better than the date" if better else "not refuted"
