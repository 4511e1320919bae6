"""A page of HTML in one file, without script or network: light and dark, wide and narrow, and on paper."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from . import chart, palette, svg
from .chart import Chart
from .markup import Child, element, html

STYLE = f"""
:root {{ color-scheme: light dark; {palette.variables()} }}
@media (prefers-color-scheme: dark) {{ :root {{ {palette.variables(dark=True)} }} }}
@media print {{ :root {{ color-scheme: light; {palette.variables()} }} }}
{Path(__file__).with_name("page.css").read_text(encoding="utf-8")}"""


def page(title: str, *body: Child) -> str:
    """The page as text.

    Args:
        title: what a browser calls it.
        body: what it shows, in order.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # a browser asks for an icon unless it is given one
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", STYLE + svg.STYLE),
    )
    return html(element("html", head, element("body", element("main", *body)), lang="en"))


def section(heading: str, *body: Child) -> Element:
    """A part of the page."""
    return element("section", element("h2", heading), *body)


def paragraph(text: str, kind: str | None = None) -> Element:
    """A paragraph; of a kind, lead, quiet or note."""
    return element("p", text, class_=kind)


def figures(charts: Iterable[Chart]) -> Element:
    """Charts side by side, as many as there is room for, each with its title and caption."""
    drawn = [
        element("figure", element("h3", one.title), svg.figure(one), element("figcaption", one.caption))
        for one in charts
    ]
    return element("div", drawn, class_="figures")


def legend(charts: Iterable[Chart]) -> Element:
    """What the lines of the charts that follow are called."""
    names = [element("li", svg.sample(style), element("span", text)) for text, style in chart.legend(charts)]
    return element("ul", names, class_="legend")


def name(text: str, style: int | None) -> Element:
    """A name with the sample of its line."""
    return element("span", None if style is None else svg.sample(style), element("span", text), class_="name")


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str | Element]],
    label: str,
    *,
    best: bool = False,
    words: Sequence[str] = (),
) -> Element:
    """A table that scrolls in itself where it is too wide; one with sentences turns into cards on a phone.

    Args:
        heads: the columns.
        rows: their cells; the first names the row.
        label: what the table is, for those who do not see it.
        best: whether the first row stands out.
        words: the columns that hold sentences.
    """
    kinds = ["text" if head in words else None for head in heads]
    body = []
    for first, *cells in rows:
        row = element("tr", element("th", first, scope="row"), class_="best" if best and not body else None)
        for cell, kind, head in zip(cells, kinds[1:], heads[1:], strict=True):
            row.append(element("td", cell, class_=kind, data_head=head if words else None))
        body.append(row)
    head = [element("th", text, scope="col", class_=kind) for text, kind in zip(heads, kinds, strict=True)]
    made = element("table", element("thead", element("tr", head)), element("tbody", body))
    return element(
        "div", made, class_="scroll cards" if words else "scroll", tabindex="0", role="region", aria_label=label
    )


def folded(heading: str, *body: Child) -> Element:
    """A part that is shown on demand."""
    return element("details", element("summary", heading), *body)


def facts(**pairs: str | None) -> Element:
    """Names and what they are; one that is empty is left out. `_` in a name is a space."""
    known = [(name.replace("_", " "), text) for name, text in pairs.items() if text]
    return element("dl", [part for pair in known for part in map(element, ("dt", "dd"), pair)], class_="facts")


def code(text: str) -> Element:
    """Text as it is, in a box."""
    return element("pre", element("code", text))
