"""The charts of a benchmark: time and memory over the length, both axes logarithmic."""

from collections.abc import Callable

from ..benchmarks.suite import Report, Row
from .chart import Axis, Chart, Line, Point, drawable
from .palette import LIGHT_LINES


def charts_of(report: Report) -> list[Chart]:
    """A chart of the time of each thing that was measured, and one of the memory that the last of them took."""
    whats = list(dict.fromkeys(row.what for row in report.rows))
    x = Axis("tokens", log=True, ticks=sorted({row.length for row in report.rows}))
    time = Axis("time", unit="seconds", log=True)

    def lines(what: str, value: Callable[[Row], float | None]) -> list[Line]:
        found = []
        for name, style in _styles(report).items():
            rows = [row for row in report.rows if (row.what, row.name) == (what, name)]
            found.append(Line(name, [Point(row.length, y) for row in rows if (y := value(row))], style))
        return found

    charts = []
    for what in whats:
        title = what if what == report.benchmark else f"{report.benchmark}: {what}"
        seconds = lines(what, lambda row: row.seconds.median if row.seconds else None)
        charts.append(Chart(title, "Medians; lower is faster.", x, time, seconds))
    held, caption = "peak", "Beyond what was held before."
    if report.benchmark == "decode":
        held, caption = "state", "Of all sequences."
    memory = Axis(f"{held} memory", unit="bytes", log=True)
    charts.append(Chart(memory.label, caption, x, memory, lines(whats[-1], lambda row: getattr(row, f"{held}_bytes"))))
    return drawable(charts)


def _styles(report: Report) -> dict[str, int]:
    """A style of each implementation; a compiled variant has its colour, and a broken line."""
    names = list(dict.fromkeys(row.name for row in report.rows))
    bases = [name.removesuffix("-compiled") for name in names]
    return {
        name: names.index(base) + len(LIGHT_LINES) if base != name and base in names else names.index(name)
        for name, base in zip(names, bases, strict=True)
    }
