"""A file of charts: a page, a drawing that needs nothing, or a picture by matplotlib, as its name ends."""

from collections.abc import Sequence
from pathlib import Path

from ..registry import SeqmixError, nearest
from . import image, page, svg
from .chart import Chart
from .files import write_text
from .markup import element, xml

ENDINGS = (".html", ".svg", *image.ENDINGS)


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
    if ending in image.ENDINGS:
        image.require_matplotlib()


def draw(charts: Sequence[Chart], file: Path, *, title: str, text: str) -> None:
    """Draw charts, at least one, two in a row; a page has a title and a text above them.

    Raises:
        SeqmixError: matplotlib is needed and not installed, or the file cannot be written.
    """
    match file.suffix.lower():
        case ".html":
            header = element("header", element("h1", title), page.paragraph(text, "quiet"))
            curves = page.section("Curves", page.legend(charts), page.figures(charts))
            write_text(page.page(title, header, curves), file)
        case ".svg":
            write_text(xml(svg.document(charts, columns=2)), file)
        case _:
            image.write(charts, file, columns=2)
