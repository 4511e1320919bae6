"""Figures as values, independent of how they are drawn: named series of points over two axes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

from ..units import choose_unit

MAX_POINTS = 600
"""Maximum number of points that are drawn of a line; without a line, all points are drawn."""
FEW = 12
"""Maximum number of points of a series with a marker and an error bar at each point; longer series have a band."""
DECADES = 20.0
"""Ratio of largest to smallest value from which an axis is logarithmic by default."""
DOUBLINGS = 8.0
"""Ratio of largest to smallest value from which an axis with chosen ticks is logarithmic by default."""
DODGE = 3.0
"""Points (1/72 inch) between the error bars of neighbouring series, so that none hides another."""
MAX_DODGE = 12.0
"""Maximum distance, in points, of the error bars of the first and the last series: further away, a bar would seem to
belong to another x value."""


class Point(NamedTuple):
    """A point, and the ends of its error bar or band (NaN for none)."""

    x: float | str
    y: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Series:
    """A named series of points."""

    name: str
    points: Sequence[Point]
    style: int = 0  # index of colour, marker and dash; a name has the same style in every figure
    faint: bool = False  # drawn thin below the other series, for noisy measurements


@dataclass(frozen=True)
class Axis:
    """An axis: label, unit and way of drawing."""

    label: str
    unit: str = ""  # "bytes", "seconds" and "share" (1 is 100 %) are converted to a unit that suits the values
    log: bool | None = None  # True for logarithmic at first; None to decide by the range of the values
    from_zero: bool = False  # True if a linear axis begins at zero
    ticks: Sequence[float] = ()  # values of the ticks; empty for round numbers
    names: Sequence[str] = ()  # categories in their order, for an axis without numbers
    noise: float = 0.0  # values below this are noise; an axis with such values is never logarithmic


class Scale(NamedTuple):
    """Scale of an axis for given values."""

    label: str  # label with the unit
    divisor: float  # value of the unit: plotted numbers are values divided by it
    kinds: Sequence[str]  # possible kinds ("linear", "log"), the initial one first
    steps: int = 0  # if all values are integers (layers, tokens), the highest minus the lowest; 0 otherwise


LOSS = Axis("loss (nats per token)", log=False)
ACCURACY = Axis("accuracy", unit="share", from_zero=True, log=False)


@dataclass(frozen=True)
class Figure:
    """A figure: series of points over two axes."""

    name: str  # name for `seqmix plot --figure`
    title: str
    caption: str  # description in a sentence or two
    x: Axis
    y: Axis
    series: Sequence[Series] = ()
    joined: bool = True  # True if a line joins the points
    marks: Mapping[float, str] = field(default_factory=dict)  # labels of vertical lines, by x value
    smooth: bool = False  # True if a page may offer smoothing

    @property
    def banded(self) -> bool:
        """True if spreads are drawn as bands (curves); False for error bars (few points)."""
        return self.joined and (self.smooth or any(len(one.points) > FEW for one in self.series))

    def scales(self) -> dict[str, Scale]:
        """Return the scales of the axes "x" and "y" for the points of all series."""
        points = [point for one in self.series for point in one.points]
        ys = [y for point in points for y in point[1:] if math.isfinite(y)]
        xs = [] if self.x.names else [float(point.x) for point in points]
        return {"x": resolve(self.x, xs), "y": resolve(self.y, ys)}

    def rows(self) -> list[dict[str, Any]]:
        """Return the points as rows of a Vega data set, in the units of the axes.

        Rows of a noisy measurement are `faint`. A row with a `marker` is drawn as a point; every row that no line
        passes through has one. A row with a spread has `low` and `high`. It is drawn as an error bar if it has a
        `dodge`, the bar's horizontal shift, and as a part of a band otherwise.
        """
        scales = self.scales()
        x, y = scales["x"].divisor, scales["y"].divisor
        step = min(DODGE, MAX_DODGE / max(1, len(self.series) - 1))
        fitted = any(one.faint for one in self.series)
        places = [point.x for one in self.series for point in one.points]
        alone_at_names = len(places) == len(set(places))
        rows = []
        for i, one in enumerate(self.series):
            points = list(one.points)
            if self.joined:
                points = [points[k] for k in thin([p.y for p in points], MAX_POINTS)]
            alone = len(points) == 1  # neither a line nor a band shows a single point
            every = 1
            if self.joined and not self.x.names and len(points) > FEW:
                every = len(points) // 5  # a few markers, elsewhere in each series
            first = (one.style * every) // 5 % every
            barred = (alone or not self.banded) and any(p.low < p.high for p in points)
            # points of a scatter, beside a fitted line, or each at a name of its own are not shifted
            scattered = not self.joined and (not self.x.names or alone_at_names)
            dodge = 0.0 if fitted or self.banded or scattered else step * (i - (len(self.series) - 1) / 2)
            for k, point in enumerate(points):
                row = {"series": one.name, "x": point.x if isinstance(point.x, str) else point.x / x, "y": point.y / y}
                if point.low <= point.high and math.isfinite(point.high - point.low):
                    row |= {"low": point.low / y, "high": point.high / y}
                if barred:
                    row["dodge"] = dodge
                if one.faint:
                    row["faint"] = True
                if (alone or not one.faint) and k % every == first:
                    row["marker"] = True
                rows.append(row)
        return rows


@dataclass(frozen=True)
class Forest(Figure):
    """A forest plot: one row for each name of the x axis, with a point and its interval along the y axis, and words.

    The names stand on the left and values run to the right; a line marks no difference.
    """

    words: Mapping[str, str] = field(default_factory=dict)  # words beside each point, by name
    margin: float | None = None  # differences up to this size do not matter: their range is shaded


def resolve(axis: Axis, values: Sequence[float]) -> Scale:
    """Return the scale of an axis for its values, which must be finite; `values` is empty for categories."""
    if axis.names or not values:
        return Scale(axis.label, 1.0, ())
    low = min(values)
    high = max(values)
    possible = low > 0 and low >= axis.noise and high > low
    log = possible and (high / low >= (DOUBLINGS if axis.ticks else DECADES) if axis.log is None else axis.log)
    unit, divisor = choose_unit(axis.unit, math.sqrt(low * high) if log else max(abs(low), abs(high)))
    kinds = ("log", "linear") if log else ("linear", "log") if possible else ("linear",)
    steps = int(high - low) if not axis.unit and all(float(value).is_integer() for value in values) else 0
    return Scale(f"{axis.label} ({unit})" if unit else axis.label, divisor, kinds, steps)


def drawable(figures: Iterable[Figure]) -> list[Figure]:
    """Drop points that are not finite, then series without points, then figures without series."""

    def finite(one: Series) -> Series:
        points = [p for p in one.points if math.isfinite(p.y) and (isinstance(p.x, str) or math.isfinite(p.x))]
        return replace(one, points=points)

    kept = (replace(figure, series=[one for one in map(finite, figure.series) if one.points]) for figure in figures)
    return [figure for figure in kept if figure.series]


def legend(figures: Iterable[Figure]) -> dict[str, int]:
    """Return the style index of each series by name, in ascending order."""
    styles = {one.name: one.style for figure in figures for one in figure.series}
    return dict(sorted(styles.items(), key=lambda pair: pair[1]))


def by_legend(figures: Iterable[Figure]) -> list[list[Figure]]:
    """Split figures, in their order, into groups that can have a common legend.

    In a group, each name has one style and each style has one name.
    """
    groups: list[list[Figure]] = []
    for figure in figures:
        if groups:
            together = [*groups[-1], figure]
            pairs = {(one.name, one.style) for each in together for one in each.series}
            if len(pairs) == len({name for name, _ in pairs}) == len({style for _, style in pairs}):
                groups[-1] = together
                continue
        groups.append([figure])
    return groups


def thin(values: Sequence[float], limit: int) -> Iterable[int]:
    """Return indices of at most about `limit` values: the first, lowest and highest of each of several stretches."""
    if len(values) <= limit:
        return range(len(values))
    kept = {0, len(values) - 1}
    edges = [round(i * len(values) / (limit // 3)) for i in range(limit // 3 + 1)]
    for first, after in pairwise(edges):
        stretch = range(first, after)
        kept |= {first, min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(kept)
