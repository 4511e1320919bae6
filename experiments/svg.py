"""A chart as SVG: text stays text, colours are CSS variables, and a pointer that rests on a point reads its values."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from . import palette
from .chart import Chart, Line, Point, Scale, legend, thinned
from .markup import element

WIDTH, HEIGHT = 340, 240
"""Of one chart, in pixels at its natural size: as wide as a phone, so that text is readable there too."""
TOP, RIGHT, BOTTOM = 26, 14, 42
CHARACTER = 6.9
"""The width of a wide character: fonts differ, and a label must not be cut off."""
MOST_POINTS, MOST_MARKERS, MOST_READ = 240, 12, 40
"""Points that are drawn of a joined line, up to how many have a marker each, and how many can be read."""
MARKERS = {
    "circle": "m-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z",
    "square": "m-3.2-3.2h6.4v6.4h-6.4z",
    "triangle": "m0-4.3l4.1 7.5h-8.2z",
    "down": "m0 4.3l4.1-7.5h-8.2z",
    "diamond": "m0-4.7l4.7 4.7-4.7 4.7-4.7-4.7z",
    "cross": "m-1.2-4.8h2.4v3.6h3.6v2.4h-3.6v3.6h-2.4v-3.6h-3.6v-2.4h3.6z",
}
"""Their outlines around a point."""
STYLE = "\n" + Path(__file__).with_name("chart.css").read_text(encoding="utf-8")


def figure(chart: Chart) -> Element:
    """One chart, its lines unnamed: a legend stands beside it. It has at least one line (`drawable`)."""
    frame = _Frame(*chart.scales())
    return element(
        "svg",
        *frame.axes(),
        *(frame.line(line, chart.joined) for line in sorted(chart.lines, key=lambda line: not line.faint)),
        class_="chart",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{chart.title}. {spoken(chart)}",
    )


def spoken(chart: Chart) -> str:
    """A chart in words: its axes, and where each line begins and ends."""
    x, y = chart.scales()
    ends = []
    for line in chart.lines:
        first, last = (y.read(line.points[i].y) for i in (0, -1))
        course = f"from {first} to {last}" if len(line.points) > 1 else first
        ends.append(f"{line.name}: {course}")
    return f"{y.label} over {x.label}. {'; '.join(ends)}."


def sample(style: int) -> Element:
    """What a legend shows of a style."""
    return element(
        "svg",
        element("path", class_="line", d="M1 6H25", stroke_dasharray=palette.dash(style)),
        _marker(style, 13, 6),
        class_="chart sample",
        viewBox="0 0 26 12",
        width="26",
        height="12",
        aria_hidden="true",
        style=_color(style),
    )


def document(charts: Sequence[Chart], columns: int) -> Element:
    """Charts side by side in one drawing that needs nothing around it, with their titles and one legend.

    Args:
        charts: what is drawn.
        columns: charts in a row, at most.
    """
    columns = min(columns, len(charts))
    width, row, gap = columns * (WIDTH + 16), HEIGHT + 44, 8
    names, bottom = _legend(legend(charts), width)
    rows = -(-len(charts) // columns)
    root = element(
        "svg",
        element(
            "style",
            f"svg {{ {palette.variables()} }} "
            f"@media (prefers-color-scheme: dark) {{ svg {{ {palette.variables(dark=True)} }} }}" + STYLE,
        ),
        element("rect", width="100%", height="100%", fill="var(--paper)"),
        names,
        xmlns="http://www.w3.org/2000/svg",
        class_="chart",
        viewBox=f"0 0 {width} {bottom + rows * row}",
        width=width,
        height=bottom + rows * row,
    )
    for i, chart in enumerate(charts):
        left, top = (i % columns) * (WIDTH + 16) + gap, bottom + (i // columns) * row
        root.append(element("text", chart.title, class_="title", x=left + 2, y=top + 14))
        drawn = figure(chart)
        drawn.attrib |= {"x": f"{left}", "y": f"{top + 22}", "width": f"{WIDTH}", "height": f"{HEIGHT}"}
        root.append(drawn)
    return root


def _legend(names: Iterable[tuple[str, int]], width: float) -> tuple[Element, float]:
    """The names in lines of a width, and where they end."""
    group, x, y = element("g"), 12.0, 18.0
    for name, style in names:
        needed = 26 + 6 + CHARACTER * len(name) + 16
        if x > 12 and x + needed > width:
            x, y = 12.0, y + 18
        drawn = sample(style)
        drawn.attrib |= {"x": f"{x:g}", "y": f"{y - 9:g}"}
        group.extend([drawn, element("text", name, x=x + 32, y=y)])
        x += needed
    return group, y + 12


class _Frame:
    """The place of a chart's axes, and what is drawn between them."""

    def __init__(self, x: Scale, y: Scale) -> None:
        self.scales = x, y
        self.left = round(10 + CHARACTER * max((len(text) for _, text in y.ticks), default=1))
        self.right, self.bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(self, value: float) -> float:
        return round(self.left + self.scales[0].position(value) * (self.right - self.left), 1)

    def up(self, value: float) -> float:
        return round(self.bottom - self.scales[1].position(value) * (self.bottom - TOP), 1)

    def axes(self) -> list[Element]:
        x, y = self.scales
        drawn = [element("text", y.label, x=2, y=11)]
        for value, text in y.ticks:
            at = self.up(value)
            drawn.append(element("path", class_="grid", d=f"M{self.left} {at}H{self.right}"))
            drawn.append(element("text", text, x=self.left - 6, y=at + 4, text_anchor="end"))
        drawn.append(element("path", class_="axis", d=f"M{self.left} {self.bottom}H{self.right}"))
        free = 0.0  # where the text before ends: one that would touch it is left out
        for value, text in x.ticks:
            at, half = self.across(value), len(text) * CHARACTER / 2
            drawn.append(element("path", class_="axis", d=f"M{at} {self.bottom}v4"))
            middle = min(max(at, half), WIDTH - half)
            if middle - half >= free:
                drawn.append(element("text", text, x=middle, y=self.bottom + 18, text_anchor="middle"))
                free = middle + half + CHARACTER
        middle = (self.left + self.right) / 2
        drawn.append(element("text", x.label, x=middle, y=self.bottom + 36, text_anchor="middle"))
        return drawn

    def line(self, line: Line, joined: bool) -> Element:
        """A line with its band or whiskers, its markers, and what a pointer reads."""
        kept = [line.points[i] for i in thinned([p.y for p in line.points], MOST_POINTS)] if joined else line.points
        places = [(self.across(p.x), self.up(p.y)) for p in kept]
        drawn: list[Element] = []
        if line.banded and joined and len(kept) > 1:
            edges = [*((p.x, p.high) for p in kept), *((p.x, p.low) for p in reversed(kept))]
            edge = _path([(self.across(x), self.up(y)) for x, y in edges])
            drawn.append(element("path", class_="band", d=f"{edge}Z"))
        elif line.banded:
            ends = [f"M{self.across(p.x)} {self.up(p.low)}V{self.up(p.high)}" for p in kept]
            drawn += [element("path", class_="whisker", d=each) for each in ends]
        if joined and len(places) > 1:
            kind = "line faint" if line.faint else "line"
            drawn.append(element("path", class_=kind, d=_path(places), stroke_dasharray=palette.dash(line.style)))
        if not line.faint:
            # on long lines a few markers, each line's elsewhere
            every = 1 if len(places) <= MOST_MARKERS else max(1, len(places) // 5)
            begin = (line.style * every) // 5 % every
            drawn += [_marker(line.style, *place) for place in places[begin::every]]
            drawn += [self._reads(line, p) for p in kept[:: max(1, len(kept) // MOST_READ)]]
        return element("g", drawn, style=_color(line.style), data_line=line.name)

    def _reads(self, line: Line, p: Point) -> Element:
        x, y = self.scales
        spread = f" ({y.read(p.low)} to {y.read(p.high)})" if line.banded else ""
        text = element("title", f"{line.name}: {y.read(p.y)}{spread} at {x.read(p.x)}")
        return element("circle", text, class_="reads", cx=self.across(p.x), cy=self.up(p.y), r=7)


def _marker(style: int, x: float, y: float) -> Element:
    return element("path", class_="marker", d=f"M{x:g} {y:g}{MARKERS[palette.marker(style)]}")


def _color(style: int) -> str:
    return f"color:var(--line-{palette.color(style)})"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
