"""Pages in which a program writes what it has measured, between marks."""

from collections.abc import Sequence

from ..registry import SeqmixError


def fill(page: str, name: str, lines: Sequence[str]) -> str:
    """A page with other lines between `<!-- name: begin -->` and `<!-- name: end -->`.

    Raises:
        SeqmixError: the page has no such region.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise SeqmixError(f"the page has no region between {begin} and {end}")
    return "\n".join([before + begin, "", *lines, "", end]) + after
