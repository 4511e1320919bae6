"""The figures of a benchmark: time and memory against the length."""

from collections.abc import Callable

from ..figures.figure import Axis, Figure, Point, Series, drawable
from ..figures.theme import COLORS
from .benchmark import Report, Row

NOISE = 2.0**20
"""Bytes below which a memory measurement is noise: the allocator rounds up."""
COMPILED = "-compiled"
"""Suffix of the name of a compiled implementation."""


def figures_of(report: Report) -> list[Figure]:
    """Return a figure of each part's time, and one of the last part's peak memory (for decoding: of its state)."""
    parts = list(dict.fromkeys(row.what for row in report.rows))
    x = Axis("tokens", log=True, ticks=sorted({row.length for row in report.rows}))

    def series(part: str, value: Callable[[Row], tuple[float, ...] | None]) -> list[Series]:
        rows = [row for row in report.rows if row.what == part]
        return [
            Series(name, [Point(row.length, *y) for row in rows if row.name == name and (y := value(row))], style)
            for name, style in _styles(report).items()
        ]

    def seconds(row: Row) -> tuple[float, ...] | None:
        return row.seconds and (row.seconds.median, row.seconds.low, row.seconds.high)

    figures = []
    for part in parts:
        title = part if part == report.benchmark else f"{report.benchmark}: {part}"
        name = title.replace(": ", "-").replace(" + ", "-").replace(" ", "-")
        caption = f"Medians of {report.settings['repeat']} rounds; bars from lowest to highest. Lower is faster."
        figures.append(Figure(name, title, caption, x, Axis("time", unit="seconds", log=True), series(part, seconds)))
    if report.benchmark == "decode":
        kind = "state"
        caption = "State of all sequences together."
        memory = Axis("state", unit="bytes", log=True)
    else:
        kind = "peak"
        caption = "Peak memory beyond that allocated before the call."
        memory = Axis("peak memory", unit="bytes", from_zero=True, log=False, noise=NOISE)

    def bytes_of(row: Row) -> tuple[float, ...] | None:
        return None if (value := getattr(row, f"{kind}_bytes")) is None else (value,)

    figures.append(Figure("memory", f"{kind.capitalize()} memory", caption, x, memory, series(parts[-1], bytes_of)))
    return drawable(figures)


def _styles(report: Report) -> dict[str, int]:
    """Return the style index of each implementation by name; a compiled variant has the uncompiled colour, dashed."""
    names = list(dict.fromkeys(row.name for row in report.rows))
    bases = list(dict.fromkeys(name.removesuffix(COMPILED) for name in names))
    compiled = COLORS * -(-len(bases) // COLORS)  # styles of the same colours that no uncompiled one has
    return {name: bases.index(name.removesuffix(COMPILED)) + compiled * name.endswith(COMPILED) for name in names}
