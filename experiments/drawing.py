"""A file of charts: a page, a drawing, or a picture of the drawing, as its name ends."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..registry import SeqmixError, nearest
from . import page, palette, svg
from .chart import Chart
from .files import write_file
from .markup import element, xml

ENDINGS = (".html", ".svg", ".png", ".pdf")


def require_drawable(option: str, file: Path) -> None:
    """Refuse a file that could not be drawn; `option` is which one has it.

    Raises:
        SeqmixError: its name ends in something else, or what draws it is not installed.
    """
    ending = file.suffix.lower()
    if ending not in ENDINGS:
        raise SeqmixError(
            f"{option} {file}: the name must end in one of {', '.join(ENDINGS)}{nearest(ending, ENDINGS)}"
        )
    if ending not in (".html", ".svg"):
        _converter(ending)


def draw(charts: Sequence[Chart], file: Path, *, title: str, text: str) -> None:
    """Draw charts, at least one, two in a row; a page has a title and a text above them.

    Raises:
        SeqmixError: what draws it is not installed, or the file cannot be written.
    """
    ending = file.suffix.lower()
    if ending == ".html":
        header = element("header", element("h1", title), page.paragraph(text, "quiet"))
        drawn = page.page(title, header, page.section("Curves", page.legend(charts), page.figures(charts)))
    else:
        drawn = xml(svg.document(charts, columns=2))
    if ending not in (".html", ".svg"):
        # a converter knows no variables of CSS
        drawn = _converter(ending)(re.sub(r"var\(--([\w-]+)\)", lambda name: palette.named()[name[1]], drawn))
    write_file(drawn, file)


def _converter(ending: str) -> Callable[[str], bytes]:
    """What makes a .png, two pixels for one, or a .pdf of a drawing.

    Raises:
        SeqmixError: it is not installed.
    """
    try:
        import vl_convert
    except ModuleNotFoundError:
        raise SeqmixError(
            f"a {ending} needs vl-convert-python: pip install 'seqmix[plots]'; .html and .svg need nothing"
        ) from None
    return partial(vl_convert.svg_to_png, scale=2.0) if ending == ".png" else vl_convert.svg_to_pdf
