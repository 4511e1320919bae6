"""Errors for users: one sentence with the place, the wrong value, the nearest match and the allowed values."""

import difflib
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

MAX_LINE_LENGTH = 2000
"""Maximum number of characters in a line of an error; the middle of a longer line is cut."""

MAX_LISTED = 10
"""Maximum number of allowed values that an error lists; of more than one further it gives only the number."""


class SeqmixError(ValueError):
    """An error that the user can fix, in one sentence; the commands print it and exit with its `exit_status`."""

    exit_status: ClassVar[int] = 2
    """Exit status of a command that ends with this error: 2, the command line or a configuration is wrong."""

    def __str__(self) -> str:
        # names and values are quoted from files: a terminal would interpret control characters, and some are megabytes
        text = "\n".join(map(_cut, super().__str__().split("\n")))
        return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class ElsewhereError(SeqmixError):
    """Another process of the same run has failed and reports the reason, so this process exits silently."""


class ConfigError(SeqmixError):
    """A configuration is wrong, or code or a file that it names is not available."""


class DataError(SeqmixError):
    """A file, run or data set is missing, damaged or unreadable, or cannot be written."""

    exit_status = 3


class OutOfMemoryError(SeqmixError):
    """A model or a computation needs more memory than there is."""

    exit_status = 5


def reason_of(error: BaseException) -> str:
    """Return any error as one line: the sentence of a SeqmixError, else its type and message."""
    try:
        text = str(error)
    except Exception:  # a plug-in's own class of error may fail to print
        text = "its message cannot be shown"
    return text if isinstance(error, SeqmixError) else " ".join([f"{type(error).__name__}:", *text.split()])


def _cut(line: str) -> str:
    """Return a line of an error; if it is longer than `MAX_LINE_LENGTH` characters, its middle is left out."""
    excess = len(line) - MAX_LINE_LENGTH
    half = MAX_LINE_LENGTH // 2
    return line if excess <= 0 else f"{line[:half]} [{excess:,} characters] {line[-half:]}"


def nearest_hint(word: str, allowed: Iterable[str]) -> str:
    """Return the end of an error message: `; did you mean "retention"?`, or "" if no allowed word is similar."""
    if len(word) > MAX_LINE_LENGTH:
        return ""
    matches = difflib.get_close_matches(word, list(allowed), n=1)
    return f'; did you mean "{matches[0]}"?' if matches else ""


def choices_hint(word: str, allowed: Iterable[str], label: str = "allowed") -> str:
    """Return the end of an error message: the nearest match, if one is similar, and the first `MAX_LISTED` words.

    `; did you mean "retention"? Allowed: attention, retention`, or `; allowed: attention, retention`.
    """
    words = list(allowed)
    listed = ", ".join(words)
    if len(words) > MAX_LISTED + 1:  # a single further word is named
        listed = f"{', '.join(words[:MAX_LISTED])} and {len(words) - MAX_LISTED} more"
    suggestion = nearest_hint(word, words)
    return f"{suggestion} {label[:1].upper()}{label[1:]}: {listed}" if suggestion else f"; {label}: {listed}"


def require_name(what: str, name: str, allowed: Collection[str]) -> None:
    """Raise a SeqmixError, with the nearest match, if a name is not allowed; `what` is the noun for it: "mixer"."""
    if name not in allowed:
        raise SeqmixError(f"there is no {what} {name!r}{choices_hint(name, allowed, f'{what}s')}")


@dataclass(frozen=True)
class Problem:
    """One line of an error, in parts."""

    sentence: str
    """The line without its place: what was expected, the value, and the remedy."""
    file: str | None
    """File, or `command line`; None if the line has no place."""
    line: int | None
    """Line of the file, from 1."""
    key: str | None
    """Dotted path of the configuration's field."""
    did_you_mean: str | None
    """Nearest allowed word, if one is similar."""


_PLACE = re.compile(
    r"((?P<file>command line|.+?(?=:\d+[:,] )):(?P<line>\d+)?(, changed on the command line)?:? "
    r"((?P<key>[\w*+-]+([.:\[][\w*+\]-]+)*): )?)?"
    r"(?P<sentence>.*)"
)
"""Form of a line of an error: `FILE:LINE: KEY: sentence`, all but the sentence optional."""


def problems(error: SeqmixError) -> list[Problem]:
    """Return the lines of an error in parts."""
    found = []
    for line in str(error).split("\n"):
        match = _PLACE.fullmatch(line)
        assert match is not None
        nearest = re.search(r'did you mean "(.*?)"\?', line)
        number = match["line"]
        found.append(
            Problem(
                match["sentence"],
                match["file"],
                None if number is None else int(number),
                match["key"],
                None if nearest is None else nearest[1],
            )
        )
    return found


def shown(value: Any) -> str:
    """Return a value as errors print it: similar to YAML, at most 80 characters."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=repr, ensure_ascii=False)
    except RecursionError:
        return "a value that is nested too deeply to show"
    return text if len(text) <= 80 else f"{text[:77]}..."
