"""A file of figures: a page, or a drawing of the size of a paper's column, as its name ends."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...registry import SeqmixError, nearest, write_file
from . import page, theme
from .figure import Figure
from .libraries import charts_module, engine, vega

ENDINGS = (".html", ".svg", ".png", ".pdf")
COLUMN = 3.25
"""The width of a paper's column, in inches."""
POINTS = 72
DOTS = 300
"""Of an inch: a spec's units, and a picture's."""
SIZE = re.compile(r'width="([\d.]+)" height="([\d.]+)"')


def require_drawable(option: str, file: Path) -> None:
    """Refuse a file that could not be drawn; `option` is which one has it.

    Raises:
        SeqmixError: its name ends in something else, or what draws it is not installed or has too little memory.
    """
    ending = file.suffix.lower()
    if ending not in ENDINGS:
        raise SeqmixError(
            f"{option} {file}: the name must end in one of {', '.join(ENDINGS)}{nearest(ending, ENDINGS)}"
        )
    engine() if ending != ".html" else vega()  # which the cache may have
    charts_module()


def draw(figures: Sequence[Figure], file: Path, *, width: float = COLUMN, **values: Any) -> None:
    """Write `content_of` figures to a file.

    Raises:
        SeqmixError: what draws it is not installed, or the file cannot be written.
    """
    write_file(content_of(figures, file.suffix, width=width, **values), file)


def content_of(figures: Sequence[Figure], ending: str, *, width: float = COLUMN, **values: Any) -> str | bytes:
    """At least one figure as a file of this ending; a drawing is `width` inches wide, a page shows `values` too.

    Raises:
        SeqmixError: what draws it is not installed.
    """
    ending = ending.lower()
    if ending == ".html":
        return page.render(figures, **values)
    drawn = theme.resolved(drawing(figures, width))
    if ending == ".pdf":
        return engine().svg_to_pdf(drawn)
    if ending == ".png":
        return engine().svg_to_png(drawn, scale=DOTS / POINTS)
    return SIZE.sub(r'width="\1pt" height="\2pt"', drawn, count=1)


def drawing(figures: Sequence[Figure], width: float) -> str:
    """SVG in points, its colours CSS variables: figures side by side where there is room for two."""
    charts = charts_module()
    convert = engine()
    columns = 2 if width > 1.5 * COLUMN and len(figures) > 1 else 1
    whole = POINTS * width
    plot = whole / columns - 44

    def drawn(plot: float) -> str:
        return convert.vegalite_to_svg(charts.paper_spec(figures, round(plot, 1), columns))

    # what labels take is known once they are drawn
    excess = float(SIZE.findall(first := drawn(plot))[0][0]) - whole
    return first if abs(excess) < 0.6 else drawn(plot - excess / columns)


def adaptive(figures: Sequence[Figure], width: float, scale: float = 1.5) -> str:
    """SVG for a page of documentation: light or dark as its reader's system is, and as many times larger."""
    drawn = drawing(figures, width)
    style = f"<style>{theme.style_sheet('svg')}</style>"

    width, height = (scale * float(side) for side in SIZE.findall(drawn)[0])
    opened, rest = SIZE.sub(f'width="{width:g}" height="{height:g}"', drawn, count=1).split(">", 1)
    return f"{opened}>{style}{rest}\n"
