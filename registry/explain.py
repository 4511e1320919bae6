"""Turn pydantic's errors into sentences: where a value was written, what it is, and what is allowed."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .errors import nearest, shown
from .tree import COMMAND_LINE, Node, Origin

_SHOWN = 5
"""Errors that are reported; the rest is counted."""

_NEEDS = {
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
"""What a value needs to be, by pydantic's error type; other types keep pydantic's message."""


class _Need(NamedTuple):
    """What a value should be; each branch of a union has one."""

    needs: str
    given: Any
    choices: Sequence[str] = ()


def explain(error: ValidationError, tree: Node) -> str:
    """One line per error, at most five: the origin, the keys that lead to the value, and a sentence."""
    by_place: dict[str, list[str | _Need]] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "too_short" and len(detail["input"]) >= detail.get("ctx", {})["min_length"]:
            continue  # pydantic counts the valid items: the invalid ones have errors of their own
        by_place.setdefault(_place(detail, tree), []).append(_problem(detail))
    lines = [place + sentence for place, problems in by_place.items() for sentence in _sentences(problems)]
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"... and {len(lines) - _SHOWN} more"]
    return "\n".join(lines)


def explain_fields(error: ValidationError, fields: Any, name: str) -> str:
    """As `explain`, of values that were given in Python, under the name that each line begins with."""
    return explain(error, Node.of(fields, Origin(name)))


def _sentences(problems: Sequence[str | _Need]) -> Iterator[str]:
    """What is wrong in one place. The branches of a union become one: "needs a number or 'auto'"."""
    yield from (problem for problem in problems if isinstance(problem, str))
    if branches := [problem for problem in problems if isinstance(problem, _Need)]:
        needs = " or ".join(dict.fromkeys(branch.needs for branch in branches))
        given = branches[0].given
        choices = [choice for branch in branches for choice in branch.choices]
        yield f"needs {needs}, and was given {shown(given)}{nearest(given, choices) if isinstance(given, str) else ''}"


def _place(detail: ErrorDetails, tree: Node) -> str:
    """`run.yaml:3: model.pattern[2]: `, or without keys for the whole."""
    location = detail["loc"]
    kind = detail["type"]
    if kind == "union_tag_invalid":
        location = (*location, _quoted(detail.get("ctx", {})["discriminator"])[0])
    keys, node = tree.find(location)
    place = str(node.origin)
    if kind in ("value_error", "assertion_error") and COMMAND_LINE in {part.origin.source for part in node.parts()}:
        # a conflict between fields, of which some or all were set on the command line
        place += f", changed on the {COMMAND_LINE}" if place != COMMAND_LINE else ""
    path = "".join(f".{key}" if isinstance(key, str) else f"[{key}]" for key in keys).removeprefix(".")
    return f"{place}: {path}: " if path else f"{place}: "


def _problem(detail: ErrorDetails) -> str | _Need:
    kind = detail["type"]
    given = detail["input"]
    message = detail["msg"]
    context = detail.get("ctx", {})
    should_be = message.removeprefix("Input should be ")
    match kind:
        case "missing":
            key = detail["loc"][-1]
            return f"missing key {key!r}" if isinstance(key, str) else f"missing item {key + 1}"
        case "union_tag_not_found":
            return f"missing key {context['discriminator']}"
        case "union_tag_invalid":
            choices = _quoted(context["expected_tags"])
            return _Need(" or ".join(map(repr, choices)), given[_quoted(context["discriminator"])[0]], choices)
        case "value_error" | "assertion_error":
            return str(context["error"])
        case "list_type" | "set_type" | "frozen_set_type" if isinstance(given, tuple):
            return "a configuration is frozen: its class must declare tuple[...] here"
        case "literal_error" | "enum":
            return _Need(should_be, given, _quoted(context["expected"]))
        case _ if kind in _NEEDS:
            limits = {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in context.items()}
            return _Need(_NEEDS[kind].format(**limits), given)
    return message if should_be == message else _Need(should_be, given)


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)
