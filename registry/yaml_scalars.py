"""The scalars of YAML 1.2's core schema, for reading and for writing.

PyYAML follows YAML 1.1, in which `no` and `on` are booleans, `010` is eight, and `1e-3` is a string. Here only `true`
and `false` are booleans, `010` is ten, `1e-3` is a number, and a date is a string.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from .tree import Scalar

TAG = "tag:yaml.org,2002:"
"""What the full names of YAML's own types begin with."""


@dataclass(frozen=True)
class ScalarType:
    """A type of scalars."""

    pattern: re.Pattern[str]
    """What all of a scalar's text must match."""
    convert: Callable[[str], Scalar]
    """The value of such a text."""


def _integer(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _number(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"

PLAIN = {
    f"{TAG}null": ScalarType(re.compile(r"(?:~|null|Null|NULL|)\Z"), lambda _: None),
    f"{TAG}bool": ScalarType(re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), lambda text: text[0] in "tT"),
    f"{TAG}int": ScalarType(re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), _integer),
    f"{TAG}float": ScalarType(re.compile(rf"(?:{_NUMBER})\Z"), _number),
}
"""The types that a scalar without quotes may have, by tag, in the order in which they are tried; if none, a string."""

MERGE = re.compile(r"<<\Z")
"""The key that merges another mapping. YAML 1.2 dropped it; who uses anchors expects it."""

Resolvers = dict[str | None, list[tuple[str, re.Pattern[str]]]]


def resolvers() -> Resolvers:
    """What a PyYAML loader or dumper knows scalars without quotes by; None: whatever their first character."""
    return {None: [*((tag, scalar.pattern) for tag, scalar in PLAIN.items()), (f"{TAG}merge", MERGE)]}
