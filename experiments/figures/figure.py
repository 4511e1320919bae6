"""Figures as values: named series of points over two axes. They know nothing of how they are drawn."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

from ..units import suited

MOST_POINTS = 600
FEW = 12
"""Points that are drawn of a series; up to how many have a marker and an error bar each, more have a band."""
DECADES = 20.0
DOUBLINGS = 8.0
"""The ratio of largest to smallest from which on an axis starts logarithmic; and one with chosen values as ticks."""
DODGE = 3.0
"""Points between the error bars of neighbours, so that none hides another."""


class Point(NamedTuple):
    """A value, and the ends of its error bar or band, if it has one."""

    x: float | str
    y: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Series:
    """Points of one name."""

    name: str
    points: Sequence[Point]
    style: int = 0  # which colour, marker and dash: the same name has the same style in every figure
    faint: bool = False  # drawn below the others, as what is measured often and noisily


@dataclass(frozen=True)
class Axis:
    """What is measured."""

    label: str
    unit: str = ""  # bytes, seconds and share (1 is 100 %) are converted to a unit that suits
    log: bool | None = None  # whether it starts logarithmic; None: where the values span decades
    zero: bool = False  # whether a linear axis begins at zero
    ticks: Sequence[float] = ()  # values that have a tick; none for round numbers
    names: Sequence[str] = ()  # categories, in their order: the axis has no numbers
    noise: float = 0.0  # what is smaller is noise: the axis is never logarithmic where a value is


class Scale(NamedTuple):
    """An axis for its values."""

    label: str  # with the unit
    divisor: float  # what the unit is of the values
    kinds: Sequence[str]  # linear and log, where the axis may be that, and first what it starts as


LOSS = Axis("loss (nats per token)", log=False)
ACCURACY = Axis("accuracy", unit="share", zero=True, log=False)


@dataclass(frozen=True)
class Figure:
    """What is drawn over two axes."""

    name: str  # as `seqmix plot --figure` has it
    title: str
    caption: str  # what is seen, in a sentence or two
    x: Axis
    y: Axis
    series: Sequence[Series] = ()
    joined: bool = True  # whether points are joined by a line
    marks: Mapping[float, str] = field(default_factory=dict)  # vertical lines and what they are called, by place
    smooth: bool = False  # whether a page may smooth it

    @property
    def banded(self) -> bool:
        """Whether spreads are bands, as those of curves are; they are error bars where there are few points."""
        return self.joined and (self.smooth or any(len(one.points) > FEW for one in self.series))

    def scales(self) -> dict[str, Scale]:
        """The two axes over all series."""
        points = [point for one in self.series for point in one.points]
        ys = [y for point in points for y in point[1:] if math.isfinite(y)]
        xs = [] if self.x.names else [float(point.x) for point in points]
        return {"x": resolve(self.x, xs), "y": resolve(self.y, ys)}

    def rows(self) -> list[dict[str, Any]]:
        """Its points as rows of a data set, in the units of the axes."""
        scales = self.scales()
        x, y = scales["x"].divisor, scales["y"].divisor
        rows = []
        for i, one in enumerate(self.series):
            kept = [one.points[k] for k in thinned([p.y for p in one.points], MOST_POINTS)]
            every = 1 if len(kept) <= FEW else max(1, len(kept) // 5)  # a few markers, each series' elsewhere
            first = (one.style * every) // 5 % every
            for k, point in enumerate(kept):
                row = {"series": one.name, "x": point.x if isinstance(point.x, str) else point.x / x, "y": point.y / y}
                if point.low <= point.high:
                    row |= {"low": point.low / y, "high": point.high / y}
                # beside a fitted line, a point stays in its place
                if not (self.banded or any(other.faint for other in self.series)) and any(p.low < p.high for p in kept):
                    row["dodge"] = DODGE * (i - (len(self.series) - 1) / 2)
                if one.faint:
                    row["faint"] = True
                elif k % every == first % every:
                    row["marker"] = True
                rows.append(row)
        return rows


def resolve(axis: Axis, values: Sequence[float]) -> Scale:
    """The scale of an axis for its values, all finite; of categories there are none."""
    if axis.names or not values:
        return Scale(axis.label, 1.0, ())
    low = min(values)
    high = max(values)
    possible = low > 0 and low >= axis.noise and high > low
    log = possible and (high / low >= (DOUBLINGS if axis.ticks else DECADES) if axis.log is None else axis.log)
    unit, divisor = suited(axis.unit, math.sqrt(low * high) if log else max(abs(low), abs(high)))
    kinds = ("log", "linear") if log else ("linear", "log") if possible else ("linear",)
    return Scale(f"{axis.label} ({unit})" if unit else axis.label, divisor, kinds)


def drawable(figures: Iterable[Figure]) -> list[Figure]:
    """Figures without points that are not finite, without empty series, and without empty figures."""

    def finite(one: Series) -> Series:
        points = [p for p in one.points if math.isfinite(p.y) and (isinstance(p.x, str) or math.isfinite(p.x))]
        return replace(one, points=points)

    kept = (replace(figure, series=[one for one in map(finite, figure.series) if one.points]) for figure in figures)
    return [figure for figure in kept if figure.series]


def legend(figures: Iterable[Figure]) -> dict[str, int]:
    """Names and styles of all series, each once, in the order of the styles."""
    styles = {one.name: one.style for figure in figures for one in figure.series}
    return dict(sorted(styles.items(), key=lambda pair: pair[1]))


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
