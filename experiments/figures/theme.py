"""The one theme of all figures: colours for light and dark as CSS variables, markers, dashes, and Vega's configuration.

The colours are those of Okabe and Ito (2008, "Color Universal Design"), made for every common colour vision. On a light
page some are darker, each until it stands out (3 to 1, WCAG 2.2 criterion 1.4.11) and still differs from all others.
"""

import re
from typing import Any

LIGHT = {"ink": "#1b1f24", "muted": "#5b636e", "rule": "#dfe3e8", "paper": "#ffffff", "panel": "#f6f7f9"}
DARK = {"ink": "#e8eaed", "muted": "#a2a9b3", "rule": "#343a43", "paper": "#14171b", "panel": "#1d2127"}
LIGHT_LINES = ("#00649c", "#e26400", "#008d66", "#cc79a7", "#805800", "#1e9be2", "#1b1f24", "#444005")
DARK_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#e8eaed", "#f0e442")
"""Blue, vermilion, green, purple, orange, sky blue, ink and yellow; further series take them again, dashed."""
COLORS = len(LIGHT_LINES)
DASHES = ([1, 0], [5, 3], [2, 2])
SHAPES = "circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"
MARKERS = dict(zip(SHAPES, "●■▲◆✚▼▶◀", strict=True))
"""Vega's shapes, and what a legend in text shows for them."""
FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"


def color(style: int) -> str:
    """The CSS variable of a series' colour."""
    return f"var(--line-{style % COLORS})"


def dash(style: int) -> list[int]:
    """A series' dashes: lengths of strokes and gaps."""
    return DASHES[style // COLORS % len(DASHES)]


def shape(style: int) -> str:
    """The shape of a series' markers."""
    return SHAPES[style % len(SHAPES)]


def colors(dark: bool = False) -> dict[str, str]:
    """All colours by the names of their variables: ink, paper, ..., line-0 and so on."""
    names, lines = (DARK, DARK_LINES) if dark else (LIGHT, LIGHT_LINES)
    return names | {f"line-{i}": line for i, line in enumerate(lines)}


def variables(dark: bool = False) -> str:
    """The colours as CSS variables."""
    return "".join(f"--{name}:{value};" for name, value in colors(dark).items())


def style_sheet(element: str) -> str:
    """CSS that defines the variables on an element: light or dark as the system is, light on paper."""
    return (
        f"{element}{{color-scheme:light dark;{variables()}}}"
        f"@media (prefers-color-scheme:dark){{{element}{{{variables(dark=True)}}}}}"
        f"@media print{{{element}{{color-scheme:light;{variables()}}}}}"
    )


def resolved(svg: str) -> str:
    """A drawing in the light colours, for programs that do not know CSS variables."""
    return re.sub(r"var\(--([\w-]+)\)", lambda name: colors()[name[1]], svg)


def config(font: float) -> dict[str, Any]:
    """Vega-Lite's configuration for a font size."""
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
        "legend": {"labelColor": "var(--ink)", "labelFontSize": font, "labelLimit": 0, "symbolSize": 4 * font}
        | {"columnPadding": 10, "rowPadding": 1, "offset": 4},
        "title": {"color": "var(--ink)", "fontSize": font + 0.5, "anchor": "start", "frame": "group", "offset": 6},
        "text": {"fontSize": font},
        "concat": {"spacing": 14},
    }
