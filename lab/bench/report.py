"""Reports of benchmarks as table cells, JSON and Markdown."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from ..units import three_digits
from .benchmark import Report, Row
from .timing import Spread

COLUMNS: dict[str, Callable[[Row], str]] = {
    "ms": lambda row: _number(row.seconds, 1e3),
    "from - to": lambda row: _range(row.seconds, 1e3),
    "ratio": lambda row: _number(row.ratio, digits=2),
    "ratio from - to": lambda row: _range(row.ratio, digits=2),
    "tokens/s": lambda row: "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
    "share": lambda row: "" if row.share is None else f"{row.share.median:.0%}",
    "peak MiB": lambda row: _mib(row.peak_bytes),
    "state MiB": lambda row: _mib(row.state_bytes),
    "nats/token": lambda row: "" if row.loss is None else f"{row.loss:.4f}",
    "parameters": lambda row: "" if row.parameters is None else f"{row.parameters:,}",
}
"""Columns with figures, by head; a column that is empty in all rows is left out."""


def markdown(report: Report) -> str:
    """Return a report as Markdown: conditions, table and notes."""
    heads, lines = cells(report)
    names = name_columns(report)
    text = [
        f"{report.title}. {conditions(report)}",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'|'.join(['---'] * names + ['---:'] * (len(heads) - names))}|",
        *(f"| {' | '.join(line)} |" for line in lines),
        "",
    ]
    text += [f"- {line}" for line in (*skipped(report), *report.notes)]
    return "\n".join(text) + "\n"


def fields_of(report: Report) -> dict[str, Any]:
    """Return a report as plain data: all figures with their lowest and highest values, and tokens per second."""
    rows = [asdict(row) | {"tokens_per_second": row.tokens_per_second} for row in report.rows]
    return asdict(report) | {"rows": rows}


def to_json(report: Report) -> str:
    """Return a report as JSON."""
    return json.dumps(fields_of(report), indent=2) + "\n"


def from_json(text: str) -> Report:
    """Read a report that `to_json` or `seqmix bench --json` has written."""
    return TypeAdapter(Report).validate_python(json.loads(text))


def conditions(report: Report) -> str:
    """Describe in one line the machine and how the calls were measured."""
    machine = report.machine
    settings = report.settings
    where = machine["device"]
    if where == "cpu":
        where = f"{machine['processor']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    text = f"{where}, torch {machine['torch']}, {settings['dtype']}; medians of {settings['repeat']}, interleaved."
    if "product_flops_per_second" in machine:
        text += (
            f" In the same rounds: product {machine['product_flops_per_second'] / 1e9:,.0f} GFLOP/s, "
            f"copy {machine['copy_bytes_per_second'] / 1e9:,.1f} GB/s."
        )
    return text


def cells(report: Report, excluded: tuple[str, ...] = ()) -> tuple[list[str], list[list[str]]]:
    """Return the heads of a report's table and its lines, without the columns in `excluded`."""
    used = {
        name: column
        for name, column in COLUMNS.items()
        if name not in excluded and any(column(row) for row in report.rows)
    }
    heads = ["what", "T", "implementation"][-name_columns(report) :] + list(used)
    lines = []
    for row in report.rows:
        figures = [column(row) for column in used.values()]
        if row.skipped and used:
            figures[0] = "skipped"
        lines.append([row.what, f"{row.length:,}", row.name][-name_columns(report) :] + figures)
    return heads, lines


def name_columns(report: Report) -> int:
    """Return the number of columns that name a line: part (if there are several), length and implementation."""
    return 3 if len({row.what for row in report.rows}) > 1 else 2


def skipped(report: Report) -> list[str]:
    """Return a line for each implementation that was skipped and each reason."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in report.rows:
        if row.skipped:
            place = f"{row.what} at {row.length:,}" if name_columns(report) == 3 else f"{row.length:,}"
            where.setdefault((row.name, row.skipped), []).append(place)
    everywhere = len({(row.what, row.length) for row in report.rows})
    lines = []
    for (name, reason), places in where.items():
        at = "" if len(places) == everywhere else f" ({', '.join(places)})"
        lines.append(f"{name} skipped{at}: {reason}")
    return lines


def _number(spread: Spread | None, scale: float = 1.0, digits: int | None = None) -> str:
    return "" if spread is None else _text(spread.median * scale, digits)


def _range(spread: Spread | None, scale: float = 1.0, digits: int | None = None) -> str:
    return "" if spread is None else f"{_text(spread.low * scale, digits)} - {_text(spread.high * scale, digits)}"


def _text(number: float, digits: int | None) -> str:
    """Format a number, by default with about three significant digits."""
    return three_digits(number) if digits is None else f"{number:,.{digits}f}"


def _mib(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 2**20:,.0f}" if size >= 10 * 2**20 else f"{size / 2**20:.1f}"
