"""From pydantic's errors to sentences that say where a value was written, what it is, and what it may be."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .errors import nearest, shown
from .tree import COMMAND_LINE, Key, Node, Origin

_SHOWN = 5
"""Errors that are told; the rest is counted."""

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
"""What a value needs to be, by pydantic's type of error; for other types its own words are used."""


@dataclass(frozen=True)
class _Problem:
    origin: Origin | str
    keys: tuple[Key, ...]
    sentence: str | None = None
    needs: str = ""
    given: Any = None
    choices: tuple[str, ...] = ()


def explain(error: ValidationError, tree: Node) -> str:
    """One line an error, at most five, each with its origin, the keys that lead to it, and a sentence."""
    by_place: dict[tuple[Key, ...], list[_Problem]] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "too_short" and len(detail["input"]) >= detail.get("ctx", {})["min_length"]:
            continue  # pydantic counts the items that are right: those that are wrong are told
        problem = _problem(detail, tree)
        by_place.setdefault(problem.keys, []).append(problem)
    lines = [line for problems in by_place.values() for line in _lines(problems)]
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"... and {len(lines) - _SHOWN} more"]
    return "\n".join(lines)


def _lines(problems: Sequence[_Problem]) -> list[str]:
    """What is wrong in one place. The branches of a union are one need: "needs a number or 'auto'"."""
    place = f"{problems[0].origin}: {_dotted(problems[0].keys)}"
    lines = [place + problem.sentence for problem in problems if problem.sentence is not None]
    if branches := [problem for problem in problems if problem.sentence is None]:
        needs = " or ".join(dict.fromkeys(problem.needs for problem in branches))
        given = branches[0].given
        choices = [choice for problem in branches for choice in problem.choices]
        hint = nearest(given, choices) if isinstance(given, str) else ""
        lines.append(f"{place}needs {needs}, and was given {shown(given)}{hint}")
    return lines


def _problem(detail: ErrorDetails, tree: Node) -> _Problem:
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    keys, node = tree.find(detail["loc"])
    if kind == "missing":
        return _Problem(node.origin, keys, _missing(detail["loc"][-1]))
    if kind == "union_tag_not_found":
        return _Problem(node.origin, keys, f"missing key {context['discriminator']}")
    if kind == "union_tag_invalid":
        keys, node = tree.find((*keys, context["discriminator"].strip("'")))
        choices = _quoted(context["expected_tags"])
        return _Problem(node.origin, keys, None, " or ".join(map(repr, choices)), node.plain(), choices)
    if kind in ("value_error", "assertion_error"):
        return _Problem(_changed(node), keys, str(context["error"]))
    if kind in ("list_type", "set_type", "frozen_set_type") and isinstance(given, tuple):
        return _Problem(node.origin, keys, "a configuration is frozen: its class must declare tuple[...] here")
    needs = _needs(kind, detail["msg"], context)
    if needs is None:
        return _Problem(node.origin, keys, detail["msg"])
    choices = _quoted(context["expected"]) if kind in ("literal_error", "enum") else ()
    return _Problem(node.origin, keys, None, needs, given, choices)


def _changed(node: Node) -> Origin | str:
    """Where a value was written whose parts do not go together: some may be of the command line."""
    if node.origin.source != COMMAND_LINE and any(part.origin.source == COMMAND_LINE for part in node.parts()):
        return f"{node.origin}, changed on the {COMMAND_LINE}"
    return node.origin


def _needs(kind: str, message: str, context: dict[str, Any]) -> str | None:
    """What pydantic says a value should be; None where it says something else."""
    if kind in _NEEDS:
        return _NEEDS[kind].format(**{name: _rounded(value) for name, value in context.items()})
    should_be = "Input should be "
    return message.removeprefix(should_be) if message.startswith(should_be) else None


def _rounded(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _missing(key: Key) -> str:
    return f"missing key {key!r}" if isinstance(key, str) else f"missing item {key + 1}"


def _quoted(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"'([^']*)'", text))


def _dotted(keys: Sequence[Key]) -> str:
    """`model.pattern[2]: `, or nothing for the whole."""
    path = "".join(f".{key}" if isinstance(key, str) else f"[{key}]" for key in keys).removeprefix(".")
    return f"{path}: " if path else ""
