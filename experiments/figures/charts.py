"""Figures as Altair charts: interactive ones for a page, with tooltips and zoom, and static ones for a paper.

The colours of a spec are CSS variables (`theme`): a page defines them, a drawing resolves them. Altair is optional:
`libraries.charts_module` imports this module.
"""

import json
from collections.abc import Sequence
from typing import Any

import altair as alt
from altair.utils.schemapi import debug_mode

from . import theme
from .figure import Axis, Figure, Scale

NUMBER = (
    "datum.value == 0 ? '0' : abs(datum.value) >= 1e4 ? format(datum.value, '.4~s') : "
    "abs(datum.value) < 1e-3 ? format(datum.value, '.2~e') : format(datum.value, ',.6~r')"
)
"""Vega expression for the text of a tick: 0.25, 2,000, 200k, 3e-4."""
HEIGHT = 0.62
"""Height of a plot divided by its width."""


def scales(figure: Figure) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the possible Vega-Lite scales by axis and kind (linear, log); the first kind is the initial one."""

    def scale(axis: Axis, kind: str) -> dict[str, Any]:
        if kind == "log":
            return {"type": "log", "base": 2 if axis.unit == "bytes" else 10, "nice": False, "padding": 8}
        # an axis that starts at zero gets no padding, which would extend it below zero
        return {"type": "linear", "zero": axis.zero, "nice": not axis.ticks} | ({} if axis.zero else {"padding": 8})

    axes = {"x": figure.x, "y": figure.y}
    return {name: {kind: scale(axes[name], kind) for kind in one.kinds} for name, one in figure.scales().items()}


def chart(figure: Figure, *, interactive: bool = False) -> alt.LayerChart:
    """Return the chart of a figure.

    An interactive chart has no legend, but a parameter `shown` with the names of the visible series.
    """
    names = {one.name: one.style for one in figure.series}
    axis_scales = figure.scales()
    rows = figure.rows()
    base = alt.Chart()
    spread = any(row["low"] < row["high"] for row in rows if "low" in row)
    dodge: dict[str, Any] = {"xOffset": alt.expr("datum.dodge || 0")} if any("dodge" in row for row in rows) else {}
    layers: list[alt.Chart | alt.LayerChart] = []
    if spread and figure.banded:
        band = base.mark_area(opacity=0.16, clip=True).transform_filter("isValid(datum.low)")
        layers.append(band.encode(y="low:Q", y2="high:Q"))
    elif spread:
        bar = base.mark_rule(strokeWidth=1.2, clip=True, **dodge).transform_filter("isValid(datum.low)")
        layers.append(bar.encode(y="low:Q", y2="high:Q"))
    if any("faint" in row for row in rows):
        layers.append(base.mark_line(strokeWidth=1, opacity=0.4, clip=True).transform_filter("datum.faint"))
    if figure.joined:
        lines = base.mark_line(strokeWidth=1.6, clip=True, **dodge).transform_filter("!datum.faint")
        layers.append(lines.encode(strokeDash=_by_style("strokeDash", names, [theme.dash(s) for s in names.values()])))
    marker = base.mark_point(filled=True, opacity=1, size=30, clip=True, **dodge).transform_filter("datum.marker")
    shape = _by_style("shape", names, [theme.shape(style) for style in names.values()])
    layers.append(marker.encode(shape=shape))
    layers += [_mark(place, label) for place, label in figure.marks.items()]
    if interactive:
        layers.append(_pointer_layer(base, figure, axis_scales, dodge))
    colors = _by_style("color", names, [theme.color(style) for style in names.values()], legend=not interactive)
    initial = {axis: next(iter(kinds.values()), None) for axis, kinds in scales(figure).items()}
    whole = alt.LayerChart(data=alt.NamedData(figure.name), layer=layers).encode(
        x=_axis(alt.X, "x", figure.x, axis_scales["x"], initial["x"]),
        y=_axis(alt.Y, "y", figure.y, axis_scales["y"], initial["y"]),
        color=colors,
    )
    if interactive:
        shown = alt.param("shown", value=list(names))
        whole = whole.add_params(shown).transform_filter("indexof(shown, datum.series) >= 0")
    return whole


def page_spec(figure: Figure) -> dict[str, Any]:
    """Return the Vega-Lite spec of a figure on a page, as wide as its container."""
    with debug_mode(False):  # no validation, which would check the same parts repeatedly; tests validate whole specs
        whole = chart(figure, interactive=True).properties(
            width="container", height=210, description=f"{figure.title}. {figure.caption}"
        )
        spec = whole.to_dict(validate=False)
    fit = {"type": "fit-x", "contains": "padding"}
    return _with_rows(spec, [figure]) | {"config": theme.config(11.5), "autosize": fit}


def paper_spec(figures: Sequence[Figure], width: float, columns: int) -> dict[str, Any]:
    """Return the Vega-Lite spec of figures for a paper, with a common legend; `width` is that of a plot, in points."""
    names = max((len(one.name) for figure in figures for one in figure.series), default=1)
    size: dict[str, Any] = {"width": width, "height": round(HEIGHT * width)}
    with debug_mode(False):
        if len(figures) == 1:
            spec = chart(figures[0]).properties(**size).to_dict(validate=False)
        else:
            titled = [chart(figure).properties(**size, title=figure.title) for figure in figures]
            spec = alt.concat(*titled, columns=columns).to_dict(validate=False)
    config: dict[str, Any] = theme.config(8) | {"aria": False}
    room = (width + 40) * min(columns, len(figures))
    config["legend"] |= {"orient": "top", "columns": max(1, int(room / (4.4 * names + 26)))}
    return _with_rows(spec, figures) | {"config": config, "padding": 2}


def _with_rows(spec: dict[str, Any], figures: Sequence[Figure]) -> dict[str, Any]:
    return spec | {"datasets": spec.get("datasets", {}) | {figure.name: figure.rows() for figure in figures}}


def _axis(kind: Any, field: str, axis: Axis, scale: Scale, first: dict[str, Any] | None) -> Any:
    if axis.names:
        names = alt.Axis(labelAngle=0, labelLimit=90)
        return kind(f"{field}:O", title=scale.label, sort=list(axis.names), axis=names)
    shown = alt.Axis(labelExpr=NUMBER, labelOverlap=True, tickCount=6)
    if axis.ticks:
        shown = alt.Axis(
            labelExpr="format(datum.value, ',~r')", labelOverlap=True, values=[t / scale.divisor for t in axis.ticks]
        )
    return kind(f"{field}:Q", title=scale.label, scale=first or alt.Undefined, axis=shown)


def _by_style(channel: str, names: dict[str, int], values: list[Any], *, legend: bool = True) -> Any:
    scale = alt.Scale(domain=list(names), range=values)
    kind = {"color": alt.Color, "shape": alt.Shape, "strokeDash": alt.StrokeDash}[channel]
    shown = alt.Legend(title=None, symbolOpacity=1) if legend and channel == "color" and len(names) > 1 else None
    return kind("series:N", scale=scale, legend=shown)


def _mark(place: float, label: str) -> Any:
    """Return a vertical line with a label."""
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
