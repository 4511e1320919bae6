"""A page of HTML in one file, without script or network: light and dark, wide and narrow, and on paper."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from xml.etree.ElementTree import Element

from ..registry import SeqmixError
from . import chart, palette, svg
from .chart import Chart
from .markup import Child, element, html

STYLE = f"""
:root {{ color-scheme: light dark; {palette.variables()} }}
@media (prefers-color-scheme: dark) {{ :root {{ {palette.variables(dark=True)} }} }}
@media print {{ :root {{ color-scheme: light; {palette.variables()} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
main {{ max-width: 1120px; margin: 0 auto; padding: 40px 16px 64px; }}
h1 {{ font-size: 28px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -.01em; }}
h2 {{ font-size: 19px; line-height: 1.3; margin: 0 0 12px; }}
h3 {{ font-size: 15px; line-height: 1.35; margin: 0; }}
p {{ margin: 0 0 12px; max-width: 760px; }}
section {{ margin-top: 44px; }}
ul {{ margin: 0 0 12px; padding-left: 20px; max-width: 760px; }}
a {{ color: inherit; }}
.lead {{ font-size: 19px; line-height: 1.45; margin: 16px 0; }}
.quiet {{ color: var(--muted); font-size: 13px; }}
.figures {{ display: grid; gap: 8px 28px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }}
figure {{ margin: 0; display: grid; grid-row: span 3; grid-template-rows: subgrid; gap: 8px; align-content: start;
  break-inside: avoid; }}
figure svg {{ width: 100%; height: auto; display: block; overflow: visible; }}
figcaption {{ margin-bottom: 24px; color: var(--muted); font-size: 13px; line-height: 1.45; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 4px 20px; list-style: none; margin: 0 0 20px; padding: 0;
  max-width: none;
  font-size: 13px; }}
.legend li, .name {{ display: inline-flex; align-items: center; gap: 8px; }}
.sample {{ flex: none; }}
.scroll {{ overflow-x: auto; margin: 0 0 12px; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: 7px 0 7px 20px; border-bottom: 1px solid var(--rule); white-space: nowrap; }}
td.text, th.text {{ text-align: left; white-space: normal; min-width: 12ch; }}
thead th {{ color: var(--muted); font-weight: 500; font-size: 13px; vertical-align: bottom; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--paper); }}
tbody th {{ font-weight: 500; }}
tr.best td, tr.best th {{ font-weight: 650; }}
details {{ border-top: 1px solid var(--rule); }}
details:last-of-type {{ border-bottom: 1px solid var(--rule); }}
summary {{ cursor: pointer; padding: 9px 0; font-weight: 500; }}
pre {{ background: var(--panel); padding: 12px 14px; margin: 0 0 14px; border-radius: 6px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }}
.facts {{ display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0 0 12px; font-size: 14px; }}
.facts dt {{ color: var(--muted); }}
.facts dd {{ margin: 0; min-width: 0; }}
.note {{ background: var(--panel); border-left: 3px solid var(--line-1); padding: 10px 14px; max-width: none; }}
@media (max-width: 520px) {{
  main {{ padding: 24px 14px 48px; }} h1 {{ font-size: 24px; }} .lead {{ font-size: 17px; }}
  .facts {{ grid-template-columns: 1fr; gap: 0; }} .facts dd {{ margin-bottom: 6px; }}
  .cards thead {{ display: none; }}
  .cards :is(table, tbody, tr, th, td) {{ display: block; padding: 0; border: 0; text-align: left;
    white-space: normal; }}
  .cards tr {{ border-bottom: 1px solid var(--rule); padding: 8px 0; }}
  .cards td:empty {{ display: none; }}
  .cards td::before {{ content: attr(data-head) ": "; color: var(--muted); }}
}}
@media print {{
  main {{ max-width: none; padding: 0; }} section {{ margin-top: 24px; }} .scroll {{ overflow: visible; }}
  .figures {{ grid-template-columns: repeat(2, 1fr); }} details::details-content {{ content-visibility: visible; }}
}}
"""


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
    for i, (first, *cells) in enumerate(rows):
        body.append(
            element(
                "tr",
                element("th", first, scope="row"),
                *(
                    element("td", cell, class_=kind, data_head=head if words else None)
                    for cell, kind, head in zip(cells, kinds[1:], heads[1:], strict=True)
                ),
                class_="best" if best and i == 0 else None,
            )
        )
    head = [element("th", text, scope="col", class_=kind) for text, kind in zip(heads, kinds, strict=True)]
    made = element("table", element("thead", element("tr", head)), element("tbody", body))
    return element(
        "div", made, class_="scroll cards" if words else "scroll", tabindex="0", role="region", aria_label=label
    )


def folded(heading: str, *body: Child) -> Element:
    """A part that is shown on demand."""
    return element("details", element("summary", heading), *body)


def facts(pairs: dict[str, str]) -> Element:
    """Names and what they are."""
    return element("dl", [part for pair in pairs.items() for part in map(element, ("dt", "dd"), pair)], class_="facts")


def code(text: str) -> Element:
    """Text as it is, in a box."""
    return element("pre", element("code", text))


def write(text: str, file: Path) -> Path:
    """Put a page or drawing into its file, whole or not at all.

    Raises:
        SeqmixError: the file cannot be written.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = f"{file.parent} is no folder" if isinstance(error, FileExistsError) else error.strerror
        raise SeqmixError(f"{file} cannot be written: {reason}") from error
    return file
