"""Columns of a study's summary: how each is read, how its cells are written, and where it is shown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..units import number, plus_minus, quantity
from .comparisons import comparisons
from .conclusion import format_statistic, variant_text
from .config_differences import format_value
from .results import EntryResult, Results, Statistic, SummaryRow
from .summary import best_first, with_timed_speeds

Place: TypeAlias = Literal["report", "table"]
"""Place that shows a summary: report.html, or the table of the terminal and of summary.md."""


MAX_STEPS = 5
"""Maximum number of seeds of which each one's steps to learn are listed."""


@dataclass(frozen=True)
class Column:
    """A column of the summary. It is left out if all its cells are empty."""

    heading: str
    """Head of the column; it is the unit where cells are numbers without one."""
    read: Callable[[Results, SummaryRow], Any]
    """Value in a row; the cell of None is empty."""
    write: Callable[[Any], str] = str
    """Text of a value."""
    write_in_report: Callable[[Any], str] | None = None
    """Text of a value in the report, if it differs from `write`."""
    shown: Callable[[Results, Place], bool] | None = None
    """Condition on the results and the place for the column to be there; None: always."""

    def cell(self, results: Results, row: SummaryRow, place: Place) -> str:
        """Return the text of a row's cell."""
        value = self.read(results, row)
        write = (place == "report" and self.write_in_report) or self.write
        return "" if value is None else write(value)


def summary_table(results: Results, place: Place = "table") -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the heads and rows of the summary, best first."""
    results = with_timed_speeds(results)
    rows = best_first(results)
    shown = [column for column in summary_columns(results) if column.shown is None or column.shown(results, place)]
    filled = [(column.heading, [column.cell(results, row, place) for row in rows]) for column in shown]
    used = [(heading, cells) for heading, cells in filled if any(cells)]
    return [heading for heading, _ in used], list(zip(*(cells for _, cells in used), strict=True))


def summary_columns(results: Results) -> list[Column]:
    """Return all columns of the summary, in order."""
    words = {(each.entry, str(each.variant)): each.words for each in comparisons(results)}
    return [
        Column("entry", lambda _, row: row.entry),
        *_variant_columns(results),
        Column("rank", lambda _, row: row.ranks, rank_text),
        Column("variant", lambda _, row: variant_text(row.variant), shown=_in_report),
        Column("learned", lambda _, row: None if row.learned is None else row, _learned),
        Column("steps to learn", lambda _, row: row.learning_steps or None, _steps),
        Column("accuracy", lambda _, row: row.accuracy, _percent, _short_percent),
        Column(f"against {results.about}", lambda _, row: words.get((row.entry, str(row.variant)))),
        Column("validation loss", lambda _, row: row.validation_loss, _decimals, format_statistic),
        *_score_columns(results),
        Column("seeds", lambda _, row: row, _seeds),
        Column("learning rate", lambda _, row: row, _rate, _rate_and_edge, shown=_in_report_or_several_rates),
        Column("parameters", lambda results, row: results.entry_of(row).parameters, "{:,}".format),
        Column(
            "forward matmul FLOPs/token",
            lambda results, row: results.entry_of(row).flops_per_token,
            number,
            shown=_in_report,
        ),
        Column("state", lambda results, row: results.entry_of(row), state_size),
        Column("tokens/s", lambda _, row: row, format_speed),
    ]


def _variant_columns(results: Results) -> Sequence[Column]:
    """Return a column of the table for each field that varies; the report has one column for all of them."""
    varied = dict.fromkeys(path for row in results.summary for path in row.variant)
    return [
        Column(
            path.rpartition(".")[2],
            lambda _, row, path=path: format_value(row.variant.get(path, "")),
            shown=_in_table,
        )
        for path in varied
    ]


def _score_columns(results: Results) -> Sequence[Column]:
    """Return a column of the table for each metric of each task."""
    scores = dict.fromkeys(
        (task, metric) for row in results.summary for task in row.scores for metric in row.scores[task]
    )
    return [
        Column(f"{task} {metric}", lambda _, row, at=(task, metric): _score(row, *at), _decimals, shown=_in_table)
        for task, metric in scores
    ]


def _score(row: SummaryRow, task: str, metric: str) -> Statistic | None:
    return row.scores.get(task, {}).get(metric)


# ---- where a column is shown


def _in_report(_: Results, place: Place) -> bool:
    return place == "report"


def _in_table(_: Results, place: Place) -> bool:
    return place == "table"


def _in_report_or_several_rates(results: Results, place: Place) -> bool:
    return place == "report" or len(results.learning_rates) > 1


# ---- how a cell is written


def rank_text(ranks: tuple[int, int]) -> str:
    """Return the lowest and the highest rank that an entry can have as text."""
    low, high = ranks
    return str(low) if low == high else f"{low} to {high}"


def _seeds(row: SummaryRow) -> str:
    return f"{row.seeds}" + (f", {row.failed} failed" if row.failed else "")


def _learned(row: SummaryRow) -> str:
    low, high = row.learned_interval or (0.0, 1.0)
    return f"{row.learned} of {row.seeds} [{100 * low:.0f} %, {100 * high:.0f} %]"


def _steps(steps: tuple[int | None, ...]) -> str:
    """Return the steps that learning took, ascending, a dash for a seed that did not learn; of many, the extremes."""
    texts = ["\N{EN DASH}" if step is None else f"{step:,}" for step in steps]
    return ", ".join(texts) if len(texts) <= MAX_STEPS else f"{texts[0]} to {texts[-1]}"


def state_size(entry: EntryResult) -> str:
    """Return the size of an entry's state as text; "grows" is appended if it grows with the sequence."""
    return quantity(entry.state_bytes, "bytes") + (", grows" if entry.state_grows else "")


def format_speed(row: SummaryRow) -> str:
    """Return the speed of a row with its range as text; empty without a speed."""
    if row.tokens_per_second is None:
        return ""
    spread = row.tokens_per_second_range
    return number(row.tokens_per_second) + (f" [{number(spread[0])}, {number(spread[1])}]" if spread else "")


def _percent(value: Statistic) -> str:
    return plus_minus(value.mean, value.margin, 1, as_percent=True)


def _short_percent(value: Statistic) -> str:
    return format_statistic(value, as_percent=True)


def _decimals(value: Statistic) -> str:
    return plus_minus(value.mean, value.margin, 4)


def _rate(row: SummaryRow) -> str:
    return f"{row.learning_rate:g}"


def _rate_and_edge(row: SummaryRow) -> str:
    return number(row.learning_rate) + (f", {row.at_edge} tried" if row.at_edge else "")
