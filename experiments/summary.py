"""Statistics over seeds: means, spreads, and each entry's best learning rate."""

from collections.abc import Iterable, Sequence
from statistics import mean, median, stdev
from typing import Literal

from .results import COSTS, Results, RunResult, Statistic, SummaryRow


def summarise(runs: Sequence[RunResult], rates: Sequence[float] = ()) -> list[SummaryRow]:
    """Return one row per entry and variant, at the learning rate with the lowest mean final validation loss.

    A rate at which fewer seeds finished than at another is left out: some of its runs diverged. `rates` is the grid of
    learning rates; a row tells whether its rate lies at an edge of the grid.
    """
    groups: dict[str, dict[float, list[RunResult]]] = {}
    for run in runs:
        by_rate = groups.setdefault(f"{run.entry} {sorted(run.variant.items())}", {})
        if run.status == "finished" and run.validation_loss is not None:
            by_rate.setdefault(run.learning_rate, []).append(run)
    rows = []
    for by_rate in filter(None, groups.values()):
        most = max(map(len, by_rate.values()))
        rate = min(
            (rate for rate in by_rate if len(by_rate[rate]) == most),
            key=lambda rate: mean(_values(by_rate[rate], "validation_loss")),
        )
        rows.append(_row(by_rate[rate], rate, _edge(rate, rates)))
    return rows


def best_first(results: Results) -> list[SummaryRow]:
    """Return the summary's rows by variant, and within a variant by accuracy, then by validation loss."""
    order = list(dict.fromkeys(str(row.variant) for row in results.summary))

    def key(row: SummaryRow) -> tuple[int, float, float]:
        return order.index(str(row.variant)), -(row.accuracy.mean if row.accuracy else 0.0), row.validation_loss.mean

    return sorted(results.summary, key=key)


def _values(runs: Iterable[RunResult], field: str) -> list[float]:
    return [value for run in runs if (value := getattr(run, field)) is not None]


def _edge(rate: float, rates: Sequence[float]) -> Literal["lowest", "highest"] | None:
    if len(rates) < 2:
        return None
    return "lowest" if rate == min(rates) else "highest" if rate == max(rates) else None


def _row(runs: Sequence[RunResult], rate: float, edge: Literal["lowest", "highest"] | None) -> SummaryRow:
    ranges = [run.tokens_per_second_range for run in runs if run.tokens_per_second_range is not None]
    speeds = _values(runs, "tokens_per_second")
    accuracies = _values(runs, "accuracy")
    return SummaryRow(
        entry=runs[0].entry,
        variant=runs[0].variant,
        learning_rate=rate,
        at_edge=edge,
        seeds=len(runs),
        **{cost: getattr(runs[0], cost) for cost in COSTS},
        tokens_per_second=median(speeds) if speeds else None,
        tokens_per_second_range=(min(ranges)[0], max(high for _, high in ranges)) if ranges else None,
        validation_loss=statistic(_values(runs, "validation_loss")),
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
    """Return mean and sample standard deviation of at least one value."""
    return Statistic(mean=mean(values), spread=stdev(values) if len(values) > 1 else None)
