"""Figures as Altair charts: interactive ones for a page, with tooltips and zoom, and static ones for a paper.

The colours of a spec are CSS variables (`theme`): a page defines them, a drawing resolves them. Altair is optional:
`libraries.charts_module` imports this module.
"""

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
from altair.utils.schemapi import debug_mode

from . import theme
from .figure import Axis, Figure, Forest, Scale, by_legend, legend

NUMBER = (
    "datum.value == 0 ? '0' : abs(datum.value) >= 1e4 ? format(datum.value, '.4~s') : "
    "abs(datum.value) < 1e-3 ? format(datum.value, '.2~e') : format(datum.value, ',.6~r')"
)
"""Vega expression for the text of a tick: 0.25, 2,000, 200k, 3e-4."""
HEIGHT = 0.62
"""Height of a plot divided by its width."""
PAGE_PLOT = 260, 210
"""Width and height in pixels for which the texts of a plot on a page are laid out; it is as wide as its container."""
ROW = 3.4
"""Height of a row of a forest plot divided by the size of the font."""
LETTER = 0.5
"""Mean width of a letter divided by the size of its font."""
LONGEST_NAME = 180
"""Maximum width of the name of a category at an axis, in the units of the spec; longer names end in dots."""
INDEPENDENT: dict[str, Any] = {"color": "independent", "shape": "independent", "strokeDash": "independent"}
"""Vega-Lite's resolution of scales between figures with different legends."""


def scales(figure: Figure) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the possible Vega-Lite scales by axis and kind (linear, log); the first kind is the initial one.

    A forest plot has none to choose from: it shows differences, from none at all.
    """
    if isinstance(figure, Forest):
        return {"x": {}, "y": {}}

    def scale(axis: Axis, kind: str) -> dict[str, Any]:
        # room around the values, so that no marker is cut; not a domain of round numbers, which could end at a value
        # that cannot exist, such as 120 %
        room = {"nice": False, "padding": 8}
        if kind == "log":
            return {"type": "log", "base": 2 if axis.unit == "bytes" else 10} | room
        return {"type": "linear", "zero": axis.from_zero} | room

    axes = {"x": figure.x, "y": figure.y}
    return {name: {kind: scale(axes[name], kind) for kind in one.kinds} for name, one in figure.scales().items()}


def chart(
    figure: Figure,
    names: Mapping[str, int],
    *,
    size: tuple[float, float],
    font: float,
    interactive: bool = False,
) -> alt.LayerChart:
    """Return the chart of a figure.

    An interactive chart has no legend, but a parameter `shown` with the names of the visible series.

    Args:
        figure: the figure.
        names: the style of each series in the legend, by name; a legend may be shared with figures of other series.
        size: the width and the height of the plot, for which texts are laid out.
        font: the size of the labels' font, in the units of the size.
        interactive: True for a chart with a pointer and zoom.
    """
    if isinstance(figure, Forest):
        return forest(figure, names, size=size, font=font, interactive=interactive)
    axis_scales = figure.scales()
    rows = figure.rows()
    base = alt.Chart()
    clip = interactive  # zoom moves marks out of the plot; without it, a marker at the edge is drawn whole
    dodge: dict[str, Any] = {"xOffset": alt.expr("datum.dodge || 0")} if any("dodge" in row for row in rows) else {}
    layers: list[alt.Chart | alt.LayerChart] = []
    if any("low" in row and "dodge" not in row for row in rows):
        band = base.mark_area(opacity=0.16, clip=clip).transform_filter("isValid(datum.low) && !isValid(datum.dodge)")
        layers.append(band.encode(y="low:Q", y2="high:Q"))
    if dodge:
        bar = base.mark_rule(strokeWidth=1.2, clip=clip, **dodge)
        bar = bar.transform_filter("isValid(datum.low) && isValid(datum.dodge)")
        layers.append(bar.encode(y="low:Q", y2="high:Q"))
    if any("faint" in row for row in rows):
        layers.append(base.mark_line(strokeWidth=1, opacity=0.4, clip=clip).transform_filter("datum.faint"))
    if figure.joined:
        lines = base.mark_line(strokeWidth=1.6, clip=clip, **dodge).transform_filter("!datum.faint")
        layers.append(lines.encode(strokeDash=_by_style("strokeDash", names, [theme.dash(s) for s in names.values()])))
    opacity = alt.expr("datum.faint ? 0.4 : 1")
    marker = base.mark_point(filled=True, opacity=opacity, size=30, clip=clip, **dodge)
    shape = _by_style("shape", names, [theme.shape(style) for style in names.values()])
    layers.append(marker.transform_filter("datum.marker").encode(shape=shape))
    layers += [_mark(place / axis_scales["x"].divisor, label) for place, label in figure.marks.items()]
    if interactive:
        layers.append(_pointer_layer(base, figure, axis_scales, dodge))
    key = None if interactive or len(names) == 1 else _legend(names, size[0] / font)
    colors = _by_style("color", names, [theme.color(style) for style in names.values()], key)
    initial = {axis: next(iter(kinds.values()), None) for axis, kinds in scales(figure).items()}
    whole = alt.LayerChart(data=alt.NamedData(figure.name), layer=layers).encode(
        x=_axis(alt.X, "x", figure.x, axis_scales["x"], initial["x"], size[0] / font),
        y=_axis(alt.Y, "y", figure.y, axis_scales["y"], initial["y"], size[1] / font),
        color=colors,
    )
    if interactive:
        shown = alt.param("shown", value=list(names))
        whole = whole.add_params(shown).transform_filter("indexof(shown, datum.series) >= 0")
    return whole


def forest(
    figure: Forest, names: Mapping[str, int], *, size: tuple[float, float], font: float, interactive: bool
) -> alt.LayerChart:
    """Return the chart of a forest plot; arguments are those of `chart`."""
    scale = figure.scales()["y"]
    axis = alt.Axis(labelExpr=NUMBER, tickCount=5)
    x = alt.X("y:Q", title=_lines(scale.label, size[0] / font), scale=alt.Scale(nice=False, padding=8), axis=axis)
    y = alt.Y("x:O", title=None, sort=list(figure.x.names), axis=alt.Axis(labelLimit=LONGEST_NAME, ticks=False))
    colors = _by_style("color", names, [theme.color(style) for style in names.values()], None)
    shape = _by_style("shape", names, [theme.shape(style) for style in names.values()])
    # the line of no difference and the margin have data of their own, and pass through all rows
    layers: list[alt.Chart | alt.LayerChart] = []
    if figure.margin is not None:
        edge = figure.margin / scale.divisor
        band = alt.Chart(alt.InlineData([{"low": -edge, "high": edge}])).mark_rect(opacity=0.12, clip=True)
        layers.append(band.encode(x="low:Q", x2="high:Q", color=alt.value("var(--muted)")))
    zero = alt.Chart(alt.InlineData([{"zero": 0}])).mark_rule(strokeDash=[3, 3], opacity=0.6)
    layers.append(zero.encode(x="zero:Q", color=alt.value("var(--muted)")))
    base = alt.Chart(alt.NamedData(figure.name)).encode(y=y, color=colors)
    if interactive:
        base = base.transform_filter("indexof(shown, datum.series) >= 0")
    layers.append(base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.4).encode(x="low:Q", x2="high:Q"))
    dots = base.mark_point(filled=True, opacity=1, size=40).encode(x=x, shape=shape)
    tooltip = [alt.Tooltip("x:N", title="entry"), alt.Tooltip("words:N", title="verdict")]
    layers.append(dots.encode(tooltip=tooltip) if interactive else dots)
    # the words stand above the interval, at the left end of the row, where they fit on a narrow page too
    text = base.mark_text(align="left", baseline="bottom", dy=-0.45 * font, fontSize=font, clip=False)
    layers.append(text.encode(x=alt.value(3), text="words:N", color=alt.value("var(--ink)")))
    whole = alt.LayerChart(data=alt.NamedData(figure.name), layer=layers)
    return whole.add_params(alt.param("shown", value=list(names))) if interactive else whole


def height_of(figure: Figure, height: float, font: float) -> float:
    """Return the height of a figure's plot: that of the others, or as many rows as a forest plot has."""
    return ROW * font * len(figure.x.names) if isinstance(figure, Forest) else height


def page_spec(figure: Figure) -> dict[str, Any]:
    """Return the Vega-Lite spec of a figure on a page, as wide as its container."""
    font = 11.5
    with debug_mode(False):  # no validation, which would check the same parts repeatedly; tests validate whole specs
        whole = chart(figure, legend([figure]), size=PAGE_PLOT, font=font, interactive=True).properties(
            width="container",
            height=height_of(figure, PAGE_PLOT[1], font),
            description=f"{figure.title}. {figure.caption}",
        )
        spec = whole.to_dict(validate=False)
    fit = {"type": "fit-x", "contains": "padding"}
    return _with_rows(spec, [figure]) | {"config": theme.config(font), "autosize": fit}


def paper_spec(figures: Sequence[Figure], width: float, columns: int) -> dict[str, Any]:
    """Return the Vega-Lite spec of figures for a paper; `width` is that of a plot, in points.

    Figures have a common legend as far as their series allow it (`by_legend`).
    """
    font = 8
    height = round(HEIGHT * width)
    letters = max((len(one.name) for figure in figures for one in figure.series), default=1)
    with debug_mode(False):
        blocks = []
        for group in by_legend(figures):
            names = legend(group)
            charts = []
            for figure in group:
                title: dict[str, Any] = {"title": _lines(figure.title, width / font)} if len(figures) > 1 else {}
                one = chart(figure, names, size=(width, height), font=font)
                charts.append(one.properties(width=width, height=height_of(figure, height, font), **title))
            blocks.append(charts[0] if len(figures) == 1 else alt.concat(*charts, columns=columns))
        whole = blocks[0] if len(blocks) == 1 else alt.vconcat(*blocks).resolve_scale(**INDEPENDENT)
        spec = whole.to_dict(validate=False)
    config: dict[str, Any] = theme.config(font) | {"aria": False}
    room = (width + 40) * min(columns, len(figures))
    config["legend"] |= {"orient": "top", "columns": max(1, int(room / (4.4 * letters + 26)))}
    return _with_rows(spec, figures) | {"config": config, "padding": 2}


def _with_rows(spec: dict[str, Any], figures: Sequence[Figure]) -> dict[str, Any]:
    return spec | {"datasets": spec.get("datasets", {}) | {figure.name: _rows(figure) for figure in figures}}


def _rows(figure: Figure) -> list[dict[str, Any]]:
    rows = figure.rows()
    return [row | {"words": figure.words.get(row["x"], "")} for row in rows] if isinstance(figure, Forest) else rows


def _axis(kind: Any, field: str, axis: Axis, scale: Scale, first: dict[str, Any] | None, room: float) -> Any:
    """Return the encoding of an axis; `room` is its length divided by the size of the font."""
    title = _lines(scale.label, room)
    if axis.names:
        angle = 0
        if LETTER * (2 + max(map(len, axis.names))) > room / len(axis.names):  # names do not fit side by side
            angle = -45 if 1.5 * len(axis.names) < room else -90
        names = alt.Axis(labelAngle=angle, labelLimit=LONGEST_NAME, labelOverlap=len(axis.names) > room)
        return kind(f"{field}:O", title=title, sort=list(axis.names), axis=names)
    shown: dict[str, Any] = {"labelExpr": NUMBER, "labelOverlap": True, "tickCount": 6}
    if scale.steps:  # ticks only at integers; with more ticks than steps, Vega would place some between them
        shown |= {"tickMinStep": 1, "tickCount": min(6, scale.steps)}
    if axis.ticks:
        shown = {"labelExpr": "format(datum.value, ',~r')", "labelOverlap": True}
        shown["values"] = [tick / scale.divisor for tick in axis.ticks]
    return kind(f"{field}:Q", title=title, scale=first or alt.Undefined, axis=alt.Axis(**shown))


def _lines(text: str, room: float) -> str | list[str]:
    """Return a text as lines that fit in the room, a width divided by the size of the font."""
    lines = textwrap.wrap(text, max(8, int(room / LETTER)))
    return lines if len(lines) > 1 else text


def _by_style(channel: str, names: Mapping[str, int], values: list[Any], legend: alt.Legend | None = None) -> Any:
    kind = {"color": alt.Color, "shape": alt.Shape, "strokeDash": alt.StrokeDash}[channel]
    return kind("series:N", scale=alt.Scale(domain=list(names), range=values), legend=legend)


def _legend(names: Iterable[str], room: float) -> alt.Legend:
    """Return a legend of these names, in lines that fit in the room: a width divided by the size of the font."""
    lines = {name: _lines(name, room) for name in names}
    wrapped = {name: text for name, text in lines.items() if text != name}
    label_options: dict[str, Any] = (
        {"labelExpr": f"{json.dumps(wrapped)}[datum.label] || datum.label"} if wrapped else {}
    )
    return alt.Legend(title=None, symbolOpacity=1, **label_options)


def _mark(place: float, label: str) -> Any:
    """Return a chart of a vertical line at an x value, with a label."""
    base = alt.Chart(alt.InlineData([{"x": place, "label": label}]))
    plain = {"color": alt.value("var(--muted)"), "x": alt.X("x:Q")}
    rule = base.mark_rule(strokeDash=[3, 3], clip=True).encode(**plain, y=alt.value(0), y2=alt.value("height"))
    text = base.mark_text(align="left", dx=3, dy=5, clip=True).encode(**plain, y=alt.value(0), text="label:N")
    return alt.layer(rule, text)


def _pointer_layer(base: alt.Chart, figure: Figure, axes: dict[str, Scale], dodge: dict[str, Any]) -> alt.Chart:
    """Return the layer of a pointer: a tooltip for the nearest point, which lights up; zoom and pan on numeric axes."""
    # the mark under the pointer is a Voronoi cell, whose datum is the mark of the nearest point
    row = "(datum.datum || datum)"
    fields = {
        "series": f"{row}.series",
        axes["x"].label: f"{row}.x" if figure.x.names else f"format({row}.x, ',.8~r')",
        axes["y"].label: f"format({row}.y, ',.5~r')",
    }
    if any(point.low < point.high for one in figure.series for point in one.points):
        fields |= {word: f"format({row}.{end}, ',.5~r')" for end, word in (("low", "from"), ("high", "to"))}
    tooltip = alt.expr(f"{{{', '.join(f'{json.dumps(label)}: {value}' for label, value in fields.items())}}}")
    near = alt.selection_point(name="near", on="pointerover", nearest=True, empty=False, clear="pointerout")
    zoom = alt.selection_interval(
        name="zoom",
        bind="scales",
        zoom="wheel![event.ctrlKey || event.altKey || event.metaKey]",
        encodings=["y"] if figure.x.names else ["x", "y"],
    )
    points = base.mark_point(filled=True, size=70, clip=True, tooltip=tooltip, **dodge).transform_filter("!datum.faint")
    lit = alt.when(near).then(alt.value(1)).otherwise(alt.value(0))
    return points.encode(opacity=lit).add_params(near, zoom)
