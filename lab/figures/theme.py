"""The theme of all figures: colours for light and dark as CSS variables, markers, dashes, and Vega's configuration.

The colours are those of Okabe and Ito (2008, "Color Universal Design"), made for every common colour vision. On a light
page some are darkened to a contrast of 3 to 1 (WCAG 2.2 criterion 1.4.11) that still keeps them apart from the others.
"""

import re
from typing import Any

LIGHT = {"ink": "#1b1f24", "muted": "#5b636e", "rule": "#dfe3e8", "paper": "#ffffff", "panel": "#f6f7f9"}
DARK = {"ink": "#e8eaed", "muted": "#a2a9b3", "rule": "#343a43", "paper": "#14171b", "panel": "#1d2127"}
LIGHT_LINES = ("#00649c", "#e26400", "#008d66", "#cc79a7", "#805800", "#1e9be2", "#1b1f24", "#444005")
DARK_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#e8eaed", "#f0e442")
"""Blue, vermilion, green, purple, orange, sky blue, ink and yellow; further series reuse them with other dashes and
markers."""
COLORS = len(LIGHT_LINES)
DASHES = ([1, 0], [5, 3], [2, 2], [8, 2, 2, 2])
SHAPES = "circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"
MARKERS = dict(zip(SHAPES, "●■▲◆✚▼▶◀", strict=True))
"""Characters for Vega's shapes in a text legend."""
FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"


def color(style: int) -> str:
    """Return the CSS variable of a style's colour."""
    return f"var(--line-{style % COLORS})"


def dash(style: int) -> list[int]:
    """Return the dashes of a style: lengths of strokes and gaps."""
    return DASHES[style // COLORS % len(DASHES)]


def shape(style: int) -> str:
    """Return the marker shape of a style; series of the same colour have different ones."""
    return SHAPES[(style + style // COLORS) % len(SHAPES)]


def line_css(style: int) -> str:
    """Return the CSS background of a horizontal line with a style's dashes."""
    stops = []
    place = 0
    for i, length in enumerate(dash(style)):
        ink = "transparent" if i % 2 else "currentColor"
        stops.append(f"{ink} {place}px {place + length}px")
        place += length
    return f"repeating-linear-gradient(90deg, {', '.join(stops)})"


def colors(dark: bool = False) -> dict[str, str]:
    """Return all colours by the names of their variables: ink, paper, ..., line-0 and so on."""
    names, lines = (DARK, DARK_LINES) if dark else (LIGHT, LIGHT_LINES)
    return names | {f"line-{i}": line for i, line in enumerate(lines)}


def variables(dark: bool = False) -> str:
    """Return CSS that sets the colours as variables."""
    return "".join(f"--{name}:{value};" for name, value in colors(dark).items())


def style_sheet(element: str) -> str:
    """Return CSS that defines the colours on an element: light or dark like the system, light in print."""
    return (
        f"{element}{{color-scheme:light dark;{variables()}}}"
        f"@media (prefers-color-scheme:dark){{{element}{{{variables(dark=True)}}}}}"
        f"@media print{{{element}{{color-scheme:light;{variables()}}}}}"
    )


def resolve_colors(svg: str) -> str:
    """Replace the CSS variables of a drawing by the light colours, for programs that do not support variables."""
    return re.sub(r"var\(--([\w-]+)\)", lambda name: colors()[name[1]], svg)


def config(font: float) -> dict[str, Any]:
    """Return Vega-Lite's configuration with labels of this font size, in the units of the spec."""
    muted = {"labelColor": "var(--muted)", "titleColor": "var(--muted)"}
    text = {"labelFontSize": font, "titleFontSize": font, "titleFontWeight": "normal"}
    lines = {"domainColor": "var(--muted)", "tickColor": "var(--muted)", "gridColor": "var(--rule)"}
    return {
        "font": FONT,
        "background": "var(--paper)",
        "view": {"stroke": None},
        "axis": muted | text | lines | {"labelPadding": 3, "titlePadding": 5, "tickSize": 3},
        "axisX": {"grid": False, "labelFlush": False},
        "axisY": {"domain": False, "ticks": False},
        # without a limit of 0, Vega-Lite hides entries after the 30th; dashes would notch the outline of a symbol
        "legend": {"labelColor": "var(--ink)", "labelFontSize": font, "labelLimit": 0, "symbolSize": 4 * font}
        | {"symbolLimit": 0, "symbolStrokeWidth": 0}
        | {"columnPadding": 10, "rowPadding": 1, "offset": 4},
        "title": {"color": "var(--ink)", "fontSize": font + 0.5, "anchor": "start", "frame": "group", "offset": 6},
        "text": {"fontSize": font},
        "concat": {"spacing": 14},
    }
