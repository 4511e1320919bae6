"""A study's results as tables: for the terminal, for a page (summary.md), and for other programs (CSV)."""

import csv
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from ..registry import write_file
from .differences import leaves
from .pages import table
from .results import EntryResult, Results, RunResult, Statistic, SummaryRow, TrainSpeedRow, where
from .scaling import scaling_lines
from .summary import best_first
from .units import number, quantity


def notes(results: Results) -> Iterator[str]:
    """What a reader must know beside the figures: how loss falls with size, edges of the grid, runs that failed."""
    for line in scaling_lines(results):
        yield f"{line}."
    for row in results.summary:
        if row.at_edge is not None:
            yield (
                f"{row.entry}{where(row.variant)}: the best learning rate, {row.learning_rate:g}, is the {row.at_edge} "
                f"that was tried; a {'lower' if row.at_edge == 'lowest' else 'higher'} one may be better."
            )
    if any(map(speed_of(results)[0], results.summary)):
        yield speed_of(results)[1]
    for run in results.runs:
        if run.status == "failed":
            yield f"{run.name} failed: {run.error}"
    if missing := [run.name for run in results.runs if run.status == "missing"]:
        more = ", ..." if len(missing) > 5 else "."
        yield f"{len(missing)} of {len(results.runs)} runs are not finished: {', '.join(missing[:5])}{more}"


Row = TypeVar("Row")
Columns: TypeAlias = Sequence[tuple[str, Callable[[Row], Any]]]
"""Heads, and the cell of each in a row."""


def filled(rows: Sequence[Row], columns: Columns[Row]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The heads and rows of a table, without columns that are empty."""
    found = [(head, [cell(row) for row in rows]) for head, cell in columns]
    used = [(head, cells) for head, cells in found if any(cells)]
    return [head for head, _ in used], list(zip(*(cells for _, cells in used), strict=True))


def speed_of(results: Results) -> tuple[Callable[[SummaryRow], str], str]:
    """The one speed of a table: its text for each row, and how it was measured.

    Where training was timed, entry beside entry, it is that speed at the training length or the length nearest to it;
    else that of the runs' own steps, which may have shared the machine.
    """
    speed = results.speed
    trained = {run.sequence_length for run in results.runs if run.sequence_length is not None}
    lengths = {row.length for row in speed.train if row.tokens_per_second is not None}
    if lengths and not any(row.variant for row in results.summary):
        at = min(lengths, key=lambda length: min((abs(length - other) for other in trained), default=-length))
        timed = {row.entry: row for row in speed.train if row.length == at}
        how = f"tokens/s: training steps at {at:,} tokens a sequence"
        how += f", {speed.tokens:,} tokens per step at most" if speed.tokens else ""
        how += f", {speed.threads} thread{'s' * (speed.threads > 1)}" if speed.threads else ""
        how += f", medians of {speed.repeat} interleaved rounds" if speed.repeat else ""
        return lambda row: _speed(timed.get(row.entry)), f"{how}; in brackets the lowest and the highest."
    alone = all(run.alone for run in results.runs if run.status == "finished")
    shared = "each run had the machine to itself" if alone else "runs may have shared the machine: no measure of speed"
    note = f"tokens/s: the median of the runs' own logged steps, in brackets the quartiles; {shared}."
    return _speed, note


def _speed(row: SummaryRow | TrainSpeedRow | None) -> str:
    if row is None or row.tokens_per_second is None:
        return ""
    spread = row.tokens_per_second_range
    return number(row.tokens_per_second) + (f" [{number(spread[0])}, {number(spread[1])}]" if spread else "")


def summary_table(results: Results) -> tuple[list[str], list[tuple[str, ...]]]:
    """The head and the rows of the summary's table."""
    varied = dict.fromkeys(path for row in results.summary for path in row.variant)
    speed, _ = speed_of(results)
    rated = len({run.learning_rate for run in results.runs}) > 1
    scores = dict.fromkeys(
        (task, metric) for row in results.summary for task in row.scores for metric in row.scores[task]
    )
    columns: Columns[SummaryRow] = [
        ("entry", lambda row: row.entry),
        *((path.rpartition(".")[2], lambda row, path=path: str(row.variant.get(path, ""))) for path in varied),
        ("accuracy", lambda row: _accuracy(row.accuracy)),
        ("validation loss", lambda row: _loss(row.validation_loss)),
        *((" ".join(at), lambda row, at=at: _score(row, *at)) for at in scores),
        ("seeds", lambda row: str(row.seeds)),
        ("learning rate", lambda row: f"{row.learning_rate:g}" if rated else ""),
        ("parameters", lambda row: f"{results.entry_of(row).parameters:,}"),
        ("state", lambda row: state_size(results.entry_of(row))),
        ("tokens/s", speed),
    ]
    return filled(best_first(results), columns)


def state_size(entry: EntryResult) -> str:
    """The bytes of an entry's state, and whether they grow."""
    return quantity(entry.state_bytes, "bytes") + (", grows" if entry.state_grows else "")


def _accuracy(value: Statistic | None) -> str:
    spread = "" if value is None or value.spread is None else f" ± {100 * value.spread:.1f}"
    return "" if value is None else f"{100 * value.mean:.1f} %{spread}"


def _score(row: SummaryRow, task: str, metric: str) -> str:
    value = row.scores.get(task, {}).get(metric)
    return "" if value is None else _loss(value)


def _loss(value: Statistic) -> str:
    return f"{value.mean:.4f}" + ("" if value.spread is None else f" ± {value.spread:.4f}")


def markdown(results: Results) -> str:
    """A page: the question, the table, what was the same for all, what was matched."""
    lines = [f"# {results.name}", ""]
    lines += [results.question, ""] if results.question else []
    lines += [*table(*summary_table(results)), ""] if results.summary else []
    lines += [f"- {sentence}" for sentence in (*results.fairness, *notes(results))]
    matched = [f"- {entry.name}: {entry.matched}" for entry in results.entries if entry.matched]
    lines += ["", "Matched:", "", *matched] if matched else []
    if results.paper:
        figures = [
            (figure.label, figure.entry, f"{figure.theirs:g}", "" if figure.ours is None else f"{figure.ours:.4g}")
            for figure in results.paper
        ]
        lines += ["", *table(["figure", "entry", "paper", "here"], figures)]
    return "\n".join(lines) + "\n"


def write_tables(results: Results, folder: Path) -> None:
    """Write runs.csv, summary.csv and summary.md."""
    for name, values in (("runs.csv", results.runs), ("summary.csv", results.summary)):
        rows = list(map(_cells, values))
        text = StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)
        write_file(text.getvalue(), folder / name)
    write_file(markdown(results), folder / "summary.md")


COLUMNS = {"variant": "", "mean": "", "accuracy_by": "accuracy"}
COLUMNS |= dict.fromkeys(("validation_loss_by", "validation_loss_by_length"), "validation_loss")
"""What fields are called in a column's name."""


def _cells(value: RunResult | SummaryRow) -> dict[str, Any]:
    """The values inside of a row, each by its path."""
    found = leaves(value.model_dump(exclude={"history", "evaluations", "at_edge"}))
    return {
        ".".join(filter(None, (COLUMNS.get(key, key) for key in path.split(".")))): leaf for path, leaf in found.items()
    }
