"""Markdown pages: tables, and regions between markers that programs rewrite."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..registry import SeqmixError


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return the lines of a table; a head that ends in a colon right-aligns its column, as for numbers."""
    names = [head.removesuffix(":") for head in heads]
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (names, *rows)]
    rule = "".join("|---:" if head.endswith(":") else "|---" for head in heads)
    return [lines[0], f"{rule}|", *lines[1:]]


def fill(file: Path, parts: Mapping[str, Sequence[str]]) -> str:
    """Return the text of a page with new lines between each `<!-- name: begin -->` and `<!-- name: end -->`.

    Raises:
        SeqmixError: the page does not have one of the regions.
    """
    page = file.read_text(encoding="utf-8")
    for name, lines in parts.items():
        begin = f"<!-- {name}: begin -->"
        end = f"<!-- {name}: end -->"
        before, begin_marker, rest = page.partition(begin)
        _, end_marker, after = rest.partition(end)
        if not (begin_marker and end_marker):
            raise SeqmixError(
                f"{file.name} has no region between {begin} and {end}: add both markers, on their own lines"
            )
        page = "\n".join([before + begin, "", *lines, "", end]) + after
    return page
