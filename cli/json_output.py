"""`--json FILE` of every command: what a command's function returns, as JSON.

A command needs no line for it: its function returns a dataclass, a pydantic model or a mapping, and its annotation of
the returned type is the schema. `Ended` wraps a result that comes with another exit status than 0.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from types import GenericAlias, UnionType
from typing import Annotated, Any, Generic, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic_core import to_jsonable_python
from typer.core import TyperCommand
from typer.models import ArgumentInfo

from ..registry import SeqmixError, choices_hint, write_file
from ..registry.errors import Problem, problems
from .options import JsonFile, require_writable
from .output import explanation

STANDARD_OUTPUT = Path("-")
"""Value of --json for standard output."""
ENVELOPE = {
    "seqmix": {"type": "string", "description": "Version of seqmix."},
    "command": {"type": "string", "description": "Name of the command."},
    "exit_status": {"type": "integer", "description": "Exit status of the command."},
    "error": {"type": "string", "description": "With `--json -` after an error: the sentence, instead of a result."},
    "problems": {
        "description": "With `error`: its lines in parts.",
        **TypeAdapter(list[Problem], config=ConfigDict(use_attribute_docstrings=True)).json_schema(),
    },
}
"""Fields of every result, as in a JSON schema."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ended(Generic[T]):
    """Result of a command that ends with an exit status other than 0."""

    result: T
    """The result."""
    status: int
    """Exit status of the command."""


def with_json(command: str, function: Callable[..., Any]) -> Callable[..., None]:
    """Return a command's function with the option --json, which writes what the function returns.

    Args:
        command: the command's name.
        function: the function; its parameters are the command's options.
    """
    before = signature(function)
    option = Parameter("json_file", Parameter.KEYWORD_ONLY, default=None, annotation=JsonFile)

    @wraps(function)
    def call(*, json_file: Path | None = None, **options: Any) -> None:
        if json_file is not None:
            _require_usable(json_file, options, before.parameters)
        with _reporting_errors(command, json_file):
            result = function(**options)
            status = 0
            if isinstance(result, Ended):
                result, status = result.result, result.status
        _write(command, json_file, status, _fields_of(result))
        if status:
            raise typer.Exit(status)

    new = before.replace(parameters=[*before.parameters.values(), option], return_annotation=None)
    setattr(call, "__signature__", new)  # noqa: B010 a function's own attribute
    call.__annotations__ = {**function.__annotations__, "json_file": JsonFile, "return": None}
    return call


def schema_of(command: str) -> dict[str, Any]:
    """Return the JSON schema of what --json of a command writes, made of what the command's function returns.

    Raises:
        SeqmixError: there is no such command.
    """
    word = command.replace("-", "_")
    words = sorted(path.stem for path in (Path(__file__).parent / "commands").glob("[!_]*.py"))
    if word not in words:
        names = [name.replace("_", "-") for name in words]
        raise SeqmixError(f"there is no command {command!r}{choices_hint(command, names, 'commands')}")
    function = getattr(import_module(f".commands.{word}", __package__), word)
    types = list(_result_types(signature(function).return_annotation))
    if not types:  # the command has no result besides its exit status
        types = [dict]
    # of a list, as pydantic takes no configuration for the schema of a dataclass
    results: Any = GenericAlias(list, (Union[tuple(types)],))  # noqa: UP007 a union of a tuple
    adapter = TypeAdapter(results, config=ConfigDict(use_attribute_docstrings=True))
    schema = adapter.json_schema(mode="serialization")
    items = schema["items"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": ENVELOPE,
        "required": [name for name in ENVELOPE if name not in ("error", "problems")],
        "anyOf": items.get("anyOf", [items]),
        "$defs": schema.get("$defs", {}),
    }


def _result_types(annotation: Any) -> Iterator[type]:
    """Yield the types of results in an annotation, without `Ended`; `Annotated[dict, T]` is a T as a mapping."""
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            if get_origin(part) is not Ended:
                yield from _result_types(part)
    elif get_origin(annotation) is Annotated:
        yield get_args(annotation)[1]
    elif annotation not in (None, type(None), Parameter.empty):
        yield annotation


class JsonCommand(TyperCommand):
    """Command that says what to write for --json without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # click's types have moved between versions
        """Parse the arguments; SeqmixError if the last one is --json."""
        if args[-1:] == ["--json"]:
            raise SeqmixError("--json expects a FILE, or - for standard output: write --json -")
        return super().parse_args(ctx, args)


def _require_usable(file: Path, options: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
    """Raise SeqmixError if a file cannot be written, or is the value of another of the command's `parameters` too."""
    if file == STANDARD_OUTPUT:
        return
    require_writable(file)
    for name, value in options.items():
        if isinstance(value, Path) and value.absolute() == file.absolute():
            label = _label(parameters[name])
            raise SeqmixError(f"{label} and --json are both {file}: give them different names")


def _label(parameter: Parameter) -> str:
    """Return how a user writes a parameter of a command: the word of an argument, or the first name of an option."""
    (info, *_) = getattr(parameter.annotation, "__metadata__", (None,))
    if isinstance(info, ArgumentInfo):
        return (info.metavar or parameter.name).strip("[]")
    names = getattr(info, "param_decls", None) or [f"--{parameter.name.replace('_', '-')}"]
    return names[0]


@contextmanager
def _reporting_errors(command: str, file: Path | None) -> Iterator[None]:
    """Context of a command: with --json -, other output goes to standard error, and an error is written as JSON too."""
    if file != STANDARD_OUTPUT:
        yield
        return
    try:
        with redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        _write(command, file, 130, {"error": "interrupted"})
        raise
    except typer.Exit as ended:
        _write(command, file, ended.exit_code, {})
        raise
    except Exception as error:
        if (known := explanation(error)) is not None:
            _write(command, file, known.exit_status, {"error": str(known), "problems": problems(known)})
        raise


def _write(command: str, file: Path | None, status: int, values: Mapping[str, Any]) -> None:
    if file is None or os.environ.get("RANK", "0") != "0":  # only the main process of several
        return
    from ..training.checkpoint.provenance import seqmix_version

    content = {"seqmix": seqmix_version(), "command": command, "exit_status": status, **values}
    # numbers that are not finite are null, as JSON has none
    text = json.dumps(_finite(to_jsonable_python(content, fallback=str)), indent=2) + "\n"
    if file == STANDARD_OUTPUT:
        sys.stdout.write(text)
    else:
        write_file(text, file)


def _fields_of(result: Any) -> Mapping[str, Any]:
    """Return the fields of a command's result by name."""
    if result is None:
        return {}
    if isinstance(result, BaseModel):
        return result.model_dump(mode="json")
    if is_dataclass(result):
        return {field.name: getattr(result, field.name) for field in fields(result)}
    return dict(result)


def _finite(value: Any) -> Any:
    """Return plain data in which numbers that are not finite are None."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list) else value
