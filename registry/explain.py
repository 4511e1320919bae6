"""Turn pydantic's errors into sentences: where the value is written, what was expected, and the value."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .errors import nearest_hint, shown
from .tree import COMMAND_LINE, Node, Origin

_MAX_LINES = 5
"""Maximum number of errors that are reported; of further ones only the number is given."""

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "path_type": "a path",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "a length >= {min_length}",
    "too_long": "a length <= {max_length}",
    "string_too_short": "a length >= {min_length}",
    "string_too_long": "a length <= {max_length}",
    "string_pattern_mismatch": "a string like {pattern}",
}
"""Expected values, by pydantic's error type; other types keep pydantic's message."""


class _Mismatch(NamedTuple):
    """A wrong value and what was expected instead; pydantic reports one for each type that the field allows."""

    expected: str
    value: Any
    allowed: Sequence[str] = ()


def explain(error: ValidationError, tree: Node) -> str:
    """Return one line per error, at most five: the file and line, the keys that lead to the value, and a sentence."""
    by_place: dict[str, list[str | _Mismatch]] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "too_short" and len(detail["input"]) >= detail.get("ctx", {})["min_length"]:
            continue  # pydantic counts only the valid items; each invalid item has its own error
        problem = _lost_key(detail, tree) or _problem(detail)
        by_place.setdefault(_place(detail, tree), []).append(problem)
    lines = [place + sentence for place, problems in by_place.items() for sentence in _sentences(problems)]
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES:] = [f"... and {len(lines) - _MAX_LINES} more"]
    return "\n".join(lines)


def explain_fields(error: ValidationError, fields: Any, name: str) -> str:
    """Return `explain` for values that were given in Python, not in a file; each line begins with `name`."""
    return explain(error, Node.of(fields, Origin(name)))


def _sentences(problems: Sequence[str | _Mismatch]) -> Iterator[str]:
    """Yield the sentences about one value; several expected types make one: "expected a number or 'auto', got 'a'"."""
    yield from (problem for problem in problems if isinstance(problem, str))
    if branches := [problem for problem in problems if isinstance(problem, _Mismatch)]:
        expected = " or ".join(dict.fromkeys(branch.expected for branch in branches))
        value = branches[0].value
        allowed = [word for branch in branches for word in branch.allowed]
        yield f"expected {expected}, got {shown(value)}{nearest_hint(value, allowed) if isinstance(value, str) else ''}"


def _place(detail: ErrorDetails, tree: Node) -> str:
    """Return the beginning of a line, `run.yaml:3: model.pattern[2]: `; without keys if the whole document is wrong."""
    location = detail["loc"]
    kind = detail["type"]
    if kind == "union_tag_invalid":
        location = (*location, _quoted(detail.get("ctx", {})["discriminator"])[0])
    keys, node = tree.find(location)
    place = str(node.origin)
    if kind in ("value_error", "assertion_error") and COMMAND_LINE in {part.origin.source for part in node.parts()}:
        # a conflict between fields, at least one of which was set on the command line
        place += f", changed on the {COMMAND_LINE}" if place != COMMAND_LINE else ""
    path = "".join(f".{key}" if isinstance(key, str) else f"[{key}]" for key in keys).removeprefix(".")
    return f"{place}: {path}: " if path else f"{place}: "


def _lost_key(detail: ErrorDetails, tree: Node) -> str | None:
    """Return the sentence on a missing key of a kind that the command line changed; None for other errors.

    The file may have the key, but a change of the kind drops it with all others.
    """
    if detail["type"] != "missing":
        return None
    key = detail["loc"][-1]
    kind = tree.find(detail["loc"])[1].child("kind")
    if kind is None or kind.origin.source != COMMAND_LINE:
        return None
    remedy = f"{{kind: {kind.value}, {key}: ...}}"
    return f"missing key {key!r}: give it with the kind, {remedy}; keys of another kind are not kept"


def _problem(detail: ErrorDetails) -> str | _Mismatch:
    """Return an error of pydantic as a sentence, or as a wrong value and what was expected instead."""
    kind = detail["type"]
    value = detail["input"]
    message = detail["msg"]
    context = detail.get("ctx", {})
    expected = message.removeprefix("Input should be ")
    match kind:
        case "missing":
            key = detail["loc"][-1]
            return f"missing key {key!r}" if isinstance(key, str) else f"missing item {key + 1}"
        case "union_tag_not_found":
            return f"missing key {context['discriminator']}"
        case "union_tag_invalid":
            tags = _quoted(context["expected_tags"])
            return _Mismatch(" or ".join(map(repr, tags)), value[_quoted(context["discriminator"])[0]], tags)
        case "value_error" | "assertion_error":
            return str(context["error"])
        case "list_type" | "set_type" | "frozen_set_type" if isinstance(value, tuple):
            return "configurations cannot contain lists or sets: declare the field as tuple[...] in its class"
        case "literal_error" | "enum":
            return _Mismatch(expected, value, _quoted(context["expected"]))
        case _ if kind in _EXPECTED:
            limits = {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in context.items()}
            return _Mismatch(_EXPECTED[kind].format(**limits), value)
    return message if expected == message else _Mismatch(expected, value)


def _quoted(text: str) -> list[str]:
    """Return the parts of a text in single quotes."""
    return re.findall(r"'([^']*)'", text)
