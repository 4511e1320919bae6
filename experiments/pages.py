"""Pages of Markdown: tables, and regions between marks that a program writes."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..registry import SeqmixError


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a table. A column of numbers, at the right, has a head that ends in a colon."""
    names = [head.removesuffix(":") for head in heads]
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (names, *rows)]
    rule = "".join("|---:" if head.endswith(":") else "|---" for head in heads)
    return [lines[0], f"{rule}|", *lines[1:]]


def fill(file: Path, parts: Mapping[str, Sequence[str]]) -> str:
    """The text of a page with other lines between each `<!-- name: begin -->` and `<!-- name: end -->`.

    Raises:
        SeqmixError: the page has no such region.
    """
    page = file.read_text(encoding="utf-8")
    for name, lines in parts.items():
        begin = f"<!-- {name}: begin -->"
        end = f"<!-- {name}: end -->"
        before, found, rest = page.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found and found_end):
            raise SeqmixError(f"{file.name} has no region between {begin} and {end}")
        page = "\n".join([before + begin, "", *lines, "", end]) + after
    return page
