"""Statistics over seeds: means, intervals, ranks, and each entry's best learning rate.

An interval is the 95 % t interval of a mean over seeds. Two entries are compared by their differences at equal seeds,
in which the effect of a seed on both cancels. They differ beyond noise if the t interval of the mean difference does
not contain 0; otherwise they are tied. Comparisons are not corrected for their number.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from statistics import mean, median, stdev
from typing import Literal

from .results import COSTS, Results, RunResult, Statistic, SummaryRow, where

CONFIDENCE = 0.95
"""Coverage of intervals."""


def choose_rates(runs: Sequence[RunResult]) -> dict[str, float]:
    """Return the best learning rate of every entry and variant whose tuning runs have ended, by entry and variant.

    The best rate has the lowest mean final validation loss. A rate at which fewer seeds finished than at another is
    left out: some of its runs diverged.
    """
    groups: dict[str, list[RunResult]] = {}
    for run in runs:
        if run.tunes:
            groups.setdefault(run.entry + where(run.variant), []).append(run)
    complete = {name: group for name, group in groups.items() if all(run.status != "missing" for run in group)}
    return {name: rate for name, group in complete.items() if (rate := _best_rate(_by_rate(group))) is not None}


def _by_rate(runs: Iterable[RunResult]) -> dict[float, list[RunResult]]:
    """Return the finished runs by learning rate."""
    by_rate: dict[float, list[RunResult]] = {}
    for run in runs:
        if run.status == "finished" and run.validation_loss is not None and run.learning_rate is not None:
            by_rate.setdefault(run.learning_rate, []).append(run)
    return by_rate


def _best_rate(by_rate: Mapping[float, Sequence[RunResult]]) -> float | None:
    most = max(map(len, by_rate.values()), default=0)
    complete = [rate for rate, runs in by_rate.items() if len(runs) == most]
    return min(complete, key=lambda rate: mean(values_of(by_rate[rate], "validation_loss")), default=None)


def summarise(runs: Sequence[RunResult], rates: Sequence[float] = ()) -> list[SummaryRow]:
    """Return one row per entry and variant, with ranks within each variant.

    `rates` is the grid of learning rates; `SummaryRow.at_edge` says if the row's rate is an end of the grid.
    """
    groups: dict[str, list[RunResult]] = {}
    for run in runs:
        if not run.tunes and run.status == "finished" and run.validation_loss is not None:
            groups.setdefault(f"{run.entry} {sorted(run.variant.items())}", []).append(run)
    with_accuracy = any(run.accuracy is not None for group in groups.values() for run in group)
    rows = []
    for group in groups.values():
        rivals = [other for other in groups.values() if other[0].variant == group[0].variant and other is not group]
        differences = [difference(other, group, "accuracy" if with_accuracy else "validation_loss") for other in rivals]
        better = sum(beyond_noise(each) and (each.mean > 0) == with_accuracy for each in differences if each)
        ranked = rivals and all(each is not None and each.margin is not None for each in differences)
        rows.append(_row(group, rates).model_copy(update={"rank": 1 + better if ranked else None}))
    return rows


def difference(one: Sequence[RunResult], other: Sequence[RunResult], field: str) -> Statistic | None:
    """Return the difference of a measured value at equal seeds, `one` minus `other`; None without a common seed."""
    ours, theirs = (
        {run.seed: value for run in runs if (value := getattr(run, field)) is not None} for runs in (one, other)
    )
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return statistic(differences) if differences else None


def beyond_noise(value: Statistic) -> bool:
    """True if the interval of a mean does not contain 0; False without an interval."""
    return value.margin is not None and abs(value.mean) > value.margin


def best_first(results: Results) -> list[SummaryRow]:
    """Return the summary's rows by variant, and within a variant by accuracy, then by validation loss."""
    order = list(dict.fromkeys(str(row.variant) for row in results.summary))

    def key(row: SummaryRow) -> tuple[int, float, float]:
        return order.index(str(row.variant)), -(row.accuracy.mean if row.accuracy else 0.0), row.validation_loss.mean

    return sorted(results.summary, key=key)


def timed_length(results: Results) -> int | None:
    """Return the length nearest to the training length at which training was timed with all entries interleaved.

    None if training was not timed, or for several variants, as only the first one is timed.
    """
    trained = {run.sequence_length for run in results.runs if run.sequence_length is not None}
    lengths = {row.length for row in results.speed.train if row.tokens_per_second is not None}
    if not lengths or any(row.variant for row in results.summary):
        return None
    return min(lengths, key=lambda length: min((abs(length - other) for other in trained), default=-length))


def with_timed_speeds(results: Results) -> Results:
    """Return results whose summary has the speeds at `timed_length`; unchanged if training was not timed.

    Otherwise a speed is that of the runs' own steps, which may have shared the machine.
    """
    at = timed_length(results)
    if at is None:
        return results
    timed = {row.entry: row for row in results.speed.train if row.length == at}
    fields = ("tokens_per_second", "tokens_per_second_range")
    rows = [
        row.model_copy(update={name: getattr(timed.get(row.entry), name, None) for name in fields})
        for row in results.summary
    ]
    return results.model_copy(update={"summary": tuple(rows)})


def values_of(runs: Iterable[RunResult], field: str) -> list[float]:
    """Return a field's value in all runs that have it."""
    return [value for run in runs if (value := getattr(run, field)) is not None]


def _edge(rate: float, rates: Sequence[float]) -> Literal["lowest", "highest"] | None:
    if len(rates) < 2:
        return None
    return "lowest" if rate == min(rates) else "highest" if rate == max(rates) else None


def _row(runs: Sequence[RunResult], rates: Sequence[float]) -> SummaryRow:
    ranges = [run.tokens_per_second_range for run in runs if run.tokens_per_second_range is not None]
    speeds = values_of(runs, "tokens_per_second")
    accuracies = values_of(runs, "accuracy")
    return SummaryRow(
        entry=runs[0].entry,
        variant=runs[0].variant,
        learning_rate=runs[0].learning_rate or 0.0,
        at_edge=_edge(runs[0].learning_rate or 0.0, rates),
        seeds=len(runs),
        **{cost: getattr(runs[0], cost) for cost in COSTS},
        tokens_per_second=median(speeds) if speeds else None,
        tokens_per_second_range=(min(ranges)[0], max(high for _, high in ranges)) if ranges else None,
        validation_loss=statistic(values_of(runs, "validation_loss")),
        accuracy=statistic(accuracies) if accuracies else None,
        accuracy_by=_by_axis([run.accuracy_by for run in runs]),
        validation_loss_by=_by_axis([run.validation_loss_by for run in runs]),
        validation_loss_by_length=_by_key([run.validation_loss_by_length for run in runs]),
        scores={task: _by_key([run.scores.get(task, {}) for run in runs]) for task in runs[0].scores},
    )


def _by_axis(axes: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, Statistic]]:
    return {name: _by_key([by.get(name, {}) for by in axes]) for name in axes[0]}


def _by_key(slices: Sequence[dict[str, float]]) -> dict[str, Statistic]:
    return {key: statistic([values[key] for values in slices if key in values]) for key in slices[0]}


def statistic(values: Sequence[float]) -> Statistic:
    """Return mean, sample standard deviation and t interval of at least one value."""
    if len(values) < 2:
        return Statistic(mean=mean(values))
    spread = stdev(values)
    margin = t_quantile(len(values) - 1) * spread / math.sqrt(len(values))
    return Statistic(mean=mean(values), spread=spread, margin=margin)


@cache
def t_quantile(degrees: int) -> float:
    """Return the number t with P(|T| < t) = `CONFIDENCE` for Student's t distribution, to 12 digits."""
    low, high = 0.0, 100.0
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(middle, degrees) < CONFIDENCE else (low, middle)
    return high


def _probability(t: float, degrees: int) -> float:
    """Return P(|T| < t) by the finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3-4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    odd = degrees % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))
