"""Charts as values: lines over two axes, and where on an axis a value lies. How they are drawn is another matter."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

SI = ("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12), ("P", 1e15), ("E", 1e18)
UNITS = {
    "bytes": (("B", 1.0), ("KiB", 2.0**10), ("MiB", 2.0**20), ("GiB", 2.0**30), ("TiB", 2.0**40)),
    "seconds": (("ns", 1e-9), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("min", 60.0), ("h", 3600.0)),
    "share": (("%", 0.01),),
}
"""Units that an axis is converted to, smallest first; any other has prefixes at its numbers (200k)."""
CHARACTERS = 40
"""How many of them fit below an axis: categories share them."""
DECADES, DOUBLINGS = 20.0, 8.0
"""The ratio of largest to smallest from which on an axis is logarithmic; and one with chosen values as ticks."""


class Point(NamedTuple):
    """Where a line is, and between what its band lies, if it has one."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Line:
    """Points of one name, and how sure they are."""

    name: str
    points: Sequence[Point]
    style: int = 0
    """Which colour, marker and dash: the same name has the same style in every chart."""
    faint: bool = False
    """Whether it is drawn below others, as what is measured often and noisily."""

    @property
    def banded(self) -> bool:
        """Whether it has a band."""
        return any(point.low <= point.high for point in self.points)

    def finite(self) -> "Line":
        """The points that can be drawn: with numbers, and not infinite."""
        return replace(self, points=[p for p in self.points if math.isfinite(p.x) and math.isfinite(p.y)])


@dataclass(frozen=True)
class Axis:
    """What is measured."""

    label: str
    unit: str = ""
    """bytes, seconds and share (1 is 100 %) are converted to a unit that suits; others stand as they are."""
    log: bool | None = None
    """None: where the values span decades."""
    zero: bool = False
    """Whether a linear axis begins at zero."""
    ticks: Sequence[float] = ()
    """Values that have a tick; none for round numbers."""
    names: Sequence[str] = ()
    """Categories, at 0, 1, 2, ...: the axis has no numbers."""


LOSS = Axis("loss (nats per token)")
ACCURACY = Axis("accuracy", unit="share", zero=True, log=False)


@dataclass(frozen=True)
class Chart:
    """A figure."""

    title: str
    caption: str
    """What is seen, in a sentence or two."""
    x: Axis
    y: Axis
    lines: Sequence[Line] = field(default_factory=tuple)
    joined: bool = True
    """Whether points are joined by a line."""

    def scales(self) -> "tuple[Scale, Scale]":
        """The two axes over all lines."""
        points = [point for line in self.lines for point in line.points]
        ys = [y for point in points for y in point[1:] if math.isfinite(y)]
        return resolve(self.x, [point.x for point in points]), resolve(self.y, ys)


@dataclass(frozen=True)
class Scale:
    """An axis with its values."""

    low: float
    high: float
    log: bool
    label: str
    """With the unit."""
    ticks: Sequence[tuple[float, str]]
    """Values and their texts, lowest first."""
    unit: str = ""
    divisor: float = 1.0
    """What the unit is of the values."""

    def position(self, value: float) -> float:
        """Where a value lies: 0 at the axis's low end, 1 at its high end."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)

    def read(self, value: float) -> str:
        """A value in words: its tick's text where it has one, and the unit."""
        exact = [text for tick, text in self.ticks if tick == value]
        return f"{exact[0] if exact else number(value / self.divisor)} {self.unit}".rstrip()


def resolve(axis: Axis, values: Sequence[float]) -> Scale:
    """The scale of an axis for its values, at least one and all finite."""
    if axis.names:
        room = CHARACTERS // len(axis.names)
        short = (name if len(name) <= room else f"{name[: room - 1]}…" for name in axis.names)
        ticks = [(float(i), name) for i, name in enumerate(short)]
        return Scale(-0.4, len(axis.names) - 0.6, False, axis.label, ticks)
    low, high = min(values), max(values)
    log = low > 0 and (high / low >= (DOUBLINGS if axis.ticks else DECADES) if axis.log is None else axis.log)
    suffix, divisor = _unit(axis.unit, math.sqrt(low * high) if log else max(abs(low), abs(high)))
    if axis.zero and not log:
        low = min(low, 0.0)
    # a single value has room around it
    room = 0.04 * (math.log(high / low) if log else high - low) or (0.2 if log else 0.1 * abs(high) or 1.0)
    bottom = low * math.exp(-room) if log else 0.0 if low == 0 else low - room
    top = high * math.exp(room) if log else high + room
    if axis.ticks:
        shown = {v: v / divisor for v in axis.ticks if bottom <= v <= top}
        texts = [(v, f"{size:,.0f}" if size == round(size) else f"{size:g}") for v, size in shown.items()]
    else:
        doubling = log and axis.unit == "bytes"
        found = (_doublings if doubling else _round_numbers)(bottom / divisor, top / divisor, log=log)
        texts = [(v * divisor, text) for v, text in found]
    return Scale(bottom, top, log, f"{axis.label} ({suffix})" if suffix else axis.label, texts, suffix, divisor)


def _unit(unit: str, size: float) -> tuple[str, float]:
    units = UNITS.get(unit, ((unit, 1.0),))
    return next((pair for pair in reversed(units) if size >= 0.999 * pair[1]), units[0])


def _doublings(low: float, high: float, *, log: bool, count: int = 6) -> list[tuple[float, str]]:
    """Powers of two from low to high, as sizes of states are; round numbers where there are too few."""
    found = [2.0**e for e in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    if len(found) < 2:
        return _round_numbers(low, high, log=log)
    return [(v, number(v)) for v in found[:: math.ceil(len(found) / count)]]


def _round_numbers(low: float, high: float, *, log: bool, count: int = 5) -> list[tuple[float, str]]:
    """Round numbers from low to high, about `count` of them, and their texts."""
    if log:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            found = [s * 10.0**e for e in exponents for s in steps if low <= s * 10.0**e <= high]
            if len(found) >= 3:
                every = math.ceil(len(found) / count) if steps == (1,) else 1
                return [(v, number(v)) for v in found[::every]]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= 0.999 * rough)
    found = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    # all texts have the decimals of the step and the prefix of the largest, for them to be of a kind
    largest = max(map(abs, found), default=0)
    prefix, unit = _prefix(largest)
    decimals = max(0, -math.floor(math.log10(step / unit) + 1e-9) + (f"{step / power:.1f}" == "2.5"))
    if decimals > 5:
        return [(v, number(v)) for v in found]
    return [(v, f"{v / unit:,.{decimals}f}{prefix}" if v else "0") for v in found]


def _prefix(size: float) -> tuple[str, float]:
    """The prefix from 10,000 on, and what it stands for."""
    return next(pair for pair in reversed(SI) if size >= 0.9995 * pair[1]) if size >= 1e4 else SI[0]


def number(value: float) -> str:
    """A number in a few characters, with the prefix of its thousands from 10,000 on: 0.25, 2,000, 200k, 1.5M, 3e-4."""
    if 0 < abs(value) < 1e-3:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    prefix, unit = _prefix(abs(value))
    return f"{value / unit:.3g}{prefix}" if abs(value) / unit < 1000 else f"{value / unit:,.0f}{prefix}"


def quantity(value: float | None, unit: str) -> str:
    """A number of bytes or seconds in the unit that suits; empty for none."""
    if value is None:
        return ""
    name, size = _unit(unit, value)
    return f"{value / size:.3g} {name}" if value / size < 1000 else f"{value / size:,.0f} {name}"


def drawable(charts: Iterable[Chart]) -> list[Chart]:
    """Charts without points that are no numbers, and without lines and charts that have no other."""
    finite = (
        replace(chart, lines=[kept for line in chart.lines if (kept := line.finite()).points]) for chart in charts
    )
    return [chart for chart in finite if chart.lines]


def legend(charts: Iterable[Chart]) -> list[tuple[str, int]]:
    """Names and styles of all lines of charts, each once, in the order of the styles."""
    styles = {line.name: line.style for chart in charts for line in chart.lines}
    return sorted(styles.items(), key=lambda pair: pair[1])


def thinned(values: Sequence[float], most: int) -> Iterable[int]:
    """Indices of the values that a line needs: in each of a few stretches, the first, the lowest and the highest."""
    if len(values) <= most:
        return range(len(values))
    kept = {0, len(values) - 1}
    edges = [round(i * len(values) / (most // 3)) for i in range(most // 3 + 1)]
    for first, after in pairwise(edges):
        stretch = range(first, after)
        kept |= {first, min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(kept)
