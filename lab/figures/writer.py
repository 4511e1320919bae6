"""Files of figures: an HTML page, or a drawing (SVG, PNG, PDF) in the width of a paper's column."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...registry import SeqmixError, nearest_hint, write_file
from . import page, theme
from .figure import Figure
from .libraries import charts_module, engine, vega

ENDINGS = (".html", ".svg", ".png", ".pdf")
COLUMN = 3.25
"""Width of a paper's column, in inches."""
POINTS = 72
"""Points per inch: widths in a Vega-Lite spec are in points."""
DOTS = 300
"""Pixels of a PNG per inch."""
SIZE = re.compile(r'width="([\d.]+)" height="([\d.]+)"')


def require_drawable(option: str, file: Path) -> None:
    """Check that a file could be drawn; `option` is the command's option that names it, for the message.

    Raises:
        SeqmixError: its ending is not supported, or the packages for it are not installed or have too little memory.
    """
    ending = file.suffix.lower()
    if ending not in ENDINGS:
        raise SeqmixError(
            f"{option} {file}: the name must end in one of {', '.join(ENDINGS)}{nearest_hint(ending, ENDINGS)}"
        )
    engine() if ending != ".html" else vega()  # a page needs no engine if Vega is cached
    charts_module()


def draw(figures: Sequence[Figure], file: Path, *, width: float = COLUMN, **values: Any) -> None:
    """Write figures to a file, in the format of its ending; see `content_of`.

    Raises:
        SeqmixError: the packages for figures are not installed, or the file cannot be written.
    """
    write_file(content_of(figures, file.suffix, width=width, **values), file)


def content_of(figures: Sequence[Figure], ending: str, *, width: float = COLUMN, **values: Any) -> str | bytes:
    """Return the content of a file with at least one figure.

    Args:
        figures: the figures.
        ending: ".html", ".svg", ".png" or ".pdf".
        width: the width of a drawing in inches; an HTML page ignores it.
        values: values that a page's template uses, such as `title`.

    Raises:
        SeqmixError: the packages for figures are not installed.
    """
    ending = ending.lower()
    if ending == ".html":
        return page.render(figures, **values)
    svg = theme.resolve_colors(drawing(figures, width))
    if ending == ".pdf":
        return engine().svg_to_pdf(svg)
    if ending == ".png":
        return engine().svg_to_png(svg, scale=DOTS / POINTS)
    return SIZE.sub(r'width="\1pt" height="\2pt"', svg, count=1)


def drawing(figures: Sequence[Figure], width: float) -> str:
    """Return an SVG in points with colours as CSS variables; figures are in two columns if the width allows it."""
    charts = charts_module()
    convert = engine()
    columns = 2 if width > 1.5 * COLUMN and len(figures) > 1 else 1
    total = POINTS * width
    plot = total / columns - 44

    def draw_svg(plot: float) -> str:
        return convert.vegalite_to_svg(charts.paper_spec(figures, round(plot, 1), columns))

    # the width of labels is known only after drawing, so a second drawing corrects the width of the plots
    first = draw_svg(plot)
    excess = float(SIZE.findall(first)[0][0]) - total
    return first if abs(excess) < 0.6 else draw_svg(plot - excess / columns)


def adaptive(figures: Sequence[Figure], width: float, scale: float = 1.5) -> str:
    """Return an SVG for a documentation page, `scale` times larger, that is light or dark like the reader's system."""
    svg = drawing(figures, width)
    style = f"<style>{theme.style_sheet('svg')}</style>"

    width, height = (scale * float(side) for side in SIZE.findall(svg)[0])
    opening, rest = SIZE.sub(f'width="{width:g}" height="{height:g}"', svg, count=1).split(">", 1)
    return f"{opening}>{style}{rest}\n"
