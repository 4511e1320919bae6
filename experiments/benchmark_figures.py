"""The figures of a benchmark: time and memory over the length."""

from collections.abc import Callable

from ..benchmarks.benchmark import Report, Row
from .figures.figure import Axis, Figure, Point, Series, drawable
from .figures.theme import COLORS

NOISE = 2.0**20
"""Bytes: what takes less than that is measured to be what the allocator rounds up to."""


def figures_of(report: Report) -> list[Figure]:
    """The time of each thing that was measured, and the memory that the last of them took."""
    whats = list(dict.fromkeys(row.what for row in report.rows))
    x = Axis("tokens", log=True, ticks=sorted({row.length for row in report.rows}))

    def series(what: str, value: Callable[[Row], tuple[float, ...] | None]) -> list[Series]:
        rows = [row for row in report.rows if row.what == what]
        return [
            Series(name, [Point(row.length, *y) for row in rows if row.name == name and (y := value(row))], style)
            for name, style in _styles(report).items()
        ]

    def seconds(row: Row) -> tuple[float, ...] | None:
        return row.seconds and (row.seconds.median, row.seconds.low, row.seconds.high)

    figures = []
    for what in whats:
        title = what if what == report.benchmark else f"{report.benchmark}: {what}"
        name = title.replace(": ", "-").replace(" + ", "-").replace(" ", "-")
        caption = f"Medians of {report.settings['repeat']} rounds, from the lowest to the highest. Lower is faster."
        figures.append(Figure(name, title, caption, x, Axis("time", unit="seconds", log=True), series(what, seconds)))
    if report.benchmark == "decode":
        held = "state"
        caption = "Of all sequences."
        memory = Axis("state", unit="bytes", log=True)
    else:
        held = "peak"
        caption = "Beyond what was allocated before."
        memory = Axis("peak memory", unit="bytes", zero=True, log=False, noise=NOISE)

    def bytes_of(row: Row) -> tuple[float, ...] | None:
        return (value,) if (value := getattr(row, f"{held}_bytes")) else None

    figures.append(Figure("memory", f"{held.capitalize()} memory", caption, x, memory, series(whats[-1], bytes_of)))
    return drawable(figures)


def _styles(report: Report) -> dict[str, int]:
    """A style of each implementation; a compiled variant has its colour, and a dashed line."""
    names = list(dict.fromkeys(row.name for row in report.rows))
    bases = [name.removesuffix("-compiled") for name in names]
    return {
        name: names.index(base) + COLORS if base != name and base in names else names.index(name)
        for name, base in zip(names, bases, strict=True)
    }
