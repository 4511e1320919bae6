"""Errors for users: one sentence that says what was given, where, what is allowed, and the nearest match."""

import difflib
import json
from collections.abc import Collection, Iterable
from typing import Any

LONGEST = 2000
"""Characters of a line of an error."""


class SeqmixError(ValueError):
    """An error that the user can fix, in one sentence; the commands print it and exit with status 2."""

    def __str__(self) -> str:
        # names and values are quoted from files: a terminal would interpret control characters, and some are megabytes
        text = "\n".join(map(_cut, super().__str__().split("\n")))
        return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class ElsewhereError(SeqmixError):
    """Another process of the same run has failed and reports why; this one exits silently."""


class ConfigError(SeqmixError):
    """A configuration is wrong, or something that it names is not available."""


def _cut(line: str) -> str:
    """A line of an error, without the middle of what is too long to read."""
    left_out = len(line) - LONGEST
    return line if left_out <= 0 else f"{line[: LONGEST // 2]} [{left_out:,} characters] {line[-LONGEST // 2 :]}"


def nearest(word: str, allowed: Iterable[str]) -> str:
    """The end of an error's sentence: `; did you mean "retention"?`, or nothing where no allowed word is close."""
    if len(word) > LONGEST:
        return ""
    matches = difflib.get_close_matches(word, list(allowed), n=1)
    return f'; did you mean "{matches[0]}"?' if matches else ""


def require_name(what: str, name: str, allowed: Collection[str]) -> None:
    """Refuse a name that is not among those that are allowed, by a SeqmixError with the nearest match."""
    if name not in allowed:
        raise SeqmixError(f"there is no {what} {name!r}; {what}s: {', '.join(allowed)}{nearest(name, allowed)}")


def shown(value: Any) -> str:
    """A value as errors print it: much as YAML has it, and not too long."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=repr, ensure_ascii=False)
    except RecursionError:
        return "what is nested too deeply to show"
    return text if len(text) <= 80 else f"{text[:77]}..."
