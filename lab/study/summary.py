"""Statistics over seeds: means, intervals, ranks, and each entry's best learning rate.

The standard deviation behind an interval is estimated from all entries of a variant together (`lab.statistics`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any, Literal, TypeAlias

from ..statistics.comparison import compare_scores
from ..statistics.learned import LEARNED, LearnedComparison, is_split, learning_steps
from .comparisons import ACCURACY_FLOOR, LOSS_FLOOR, VariantComparison, compare_runs, distinct
from .results import COSTS, Results, RunResult, Statistic, SummaryRow, where

MEASURED = ("validation_loss", "accuracy", "accuracy_by", "validation_loss_by", "validation_loss_by_length", "scores")
"""Fields of a run that are measured, of which the summary has statistics."""
Path: TypeAlias = tuple[str, ...]
"""Field of a run and keys in it, such as ("accuracy_by", "pairs", "8")."""


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


def summarise(runs: Sequence[RunResult], rates: Sequence[float] = (), learned: float = LEARNED) -> list[SummaryRow]:
    """Return one row per entry and variant, with ranks within each variant.

    Args:
        runs: the runs of a study; those that tune are left out.
        rates: the grid of learning rates; `SummaryRow.at_edge` says if the row's rate is an end of the grid.
        learned: the accuracy from which a seed has learned a task.
    """
    rows = []
    for variant in distinct(run.variant for run in runs):
        of_variant = [run for run in runs if run.variant == variant and not run.tunes]
        entries: dict[str, list[RunResult]] = {}
        for run in of_variant:
            if run.status == "finished" and run.validation_loss is not None:
                entries.setdefault(run.entry, []).append(run)
        measured = statistics_of(entries, learned)
        compared = compare_runs(of_variant, learned=learned)
        rows += [_row(of, rates, measured[name], compared, learned) for name, of in entries.items()]
    order = {each: i for i, each in enumerate(dict.fromkeys((run.entry, str(run.variant)) for run in runs))}
    return sorted(rows, key=lambda row: order[row.entry, str(row.variant)])


def statistics_of(entries: Mapping[str, Sequence[RunResult]], learned: float = LEARNED) -> dict[str, dict[str, Any]]:
    """Return the statistics of each entry's measured values, by field, nested as the fields are.

    The interval of a mean uses the runs of all entries. There is none for an accuracy whose seeds are split.
    """
    by_path: dict[Path, dict[str, list[float]]] = {}
    for name, runs in entries.items():
        for run in runs:
            for path, value in _paths({field: getattr(run, field) for field in MEASURED}):
                by_path.setdefault(path, {}).setdefault(name, []).append(value)
    found: dict[str, dict[str, Any]] = {name: {} for name in entries}
    for path, scores in by_path.items():
        of_accuracy = path[0].startswith("accuracy")
        margins: Mapping[str, float] = {}
        if not (of_accuracy and is_split(scores, learned)):
            floor = ACCURACY_FLOOR if of_accuracy else LOSS_FLOOR
            margins = compare_scores(scores, higher_is_better=of_accuracy, floor=floor).margins
        for name, values in scores.items():
            place = found[name]
            for key in path[:-1]:
                place = place.setdefault(key, {})
            place[path[-1]] = statistic(values).model_copy(update={"margin": margins.get(name)})
    return found


def _paths(values: Mapping[str, Any], above: Path = ()) -> Iterator[tuple[Path, float]]:
    """Yield the numbers in nested mappings, each with its path."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _paths(value, (*above, key))
        elif value is not None:
            yield (*above, key), value


def best_first(results: Results) -> list[SummaryRow]:
    """Return the summary's rows by variant, and within a variant by accuracy, then by validation loss.

    Where seeds are split, entries come in the order of the seeds that learned. Entries of which seeds failed come last.
    """
    order = list(dict.fromkeys(str(row.variant) for row in results.summary))

    def key(row: SummaryRow) -> tuple[int, bool, float, float, float]:
        share = row.learned / row.seeds if row.learned is not None else 0.0
        accuracy = row.accuracy.mean if row.accuracy else 0.0
        return order.index(str(row.variant)), row.failed > 0, -share, -accuracy, row.validation_loss.mean

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


def _row(
    runs: Sequence[RunResult],
    rates: Sequence[float],
    measured: Mapping[str, Any],
    compared: VariantComparison,
    learned: float,
) -> SummaryRow:
    entry = runs[0].entry
    ranges = [run.tokens_per_second_range for run in runs if run.tokens_per_second_range is not None]
    speeds = values_of(runs, "tokens_per_second")
    split: dict[str, Any] = {}
    if isinstance(compared.found, LearnedComparison):
        count = compared.found.counts[entry]
        steps = [learning_steps([(e.step, e.accuracy or 0.0) for e in run.evaluations], learned) for run in runs]
        # the steps of runs that learned, then those that did not
        split = {
            "learned": count.learned,
            "learned_interval": (count.low, count.high),
            "learning_steps": tuple(sorted(steps, key=lambda step: (step is None, step or 0))),
        }
    return SummaryRow(
        entry=entry,
        variant=runs[0].variant,
        ranks=compared.ranks.get(entry),
        learning_rate=runs[0].learning_rate or 0.0,
        at_edge=_edge(runs[0].learning_rate or 0.0, rates),
        seeds=len(runs),
        failed=compared.failed.get(entry, 0),
        **split,
        **{cost: getattr(runs[0], cost) for cost in COSTS},
        tokens_per_second=median(speeds) if speeds else None,
        tokens_per_second_range=(min(ranges)[0], max(high for _, high in ranges)) if ranges else None,
        **measured,
    )


def statistic(values: Sequence[float]) -> Statistic:
    """Return the mean and the sample standard deviation of at least one value, without an interval."""
    return Statistic(mean=mean(values), spread=stdev(values) if len(values) > 1 else None)
