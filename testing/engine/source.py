"""Python source that recreates values, for reports."""

import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from ...ops.runtime.paradigm import Paradigm
from ...registry import Config


def source(value: Any) -> str:
    """Return Python that recreates a value; a configuration shows only fields that differ from their defaults."""
    if isinstance(written := getattr(value, "written", None), str):  # an adapter's configuration: not reproducible
        return written
    if isinstance(value, Config):
        defaults = {name: field.default for name, field in type(value).model_fields.items()}
        return call_source(type(value).__name__, non_defaults(vars(value), defaults))
    if isinstance(value, Enum):  # a paradigm, or a plug-in's own enum
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, tuple):
        return f"({', '.join(map(source, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {source(item)}" for name, item in value.items()) + "}"
    return repr(value)


def call_source(function: str, named: Mapping[str, Any], *positional: str) -> str:
    """Return the source of a call; positional arguments are Python source already, named ones are values."""
    return f"{function}({', '.join([*positional, *(f'{name}={source(value)}' for name, value in named.items())])})"


def non_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that differ from their defaults, in the order of the defaults."""
    return {name: values[name] for name, default in defaults.items() if values[name] != default}


class WrittenCase:
    """Base of a dataclass whose `repr` is Python that recreates it; every field needs a default."""

    def __repr__(self) -> str:
        """Return the call that recreates the value, with the fields that differ from their defaults."""
        return call_source(type(self).__name__, non_defaults(vars(self), vars(type(self)())))


def imports(written: str, kit: str, values: Any = ()) -> Iterator[str]:
    """Yield the import lines that Python source needs.

    Args:
        written: the source.
        kit: the names that it uses from `seqmix.testing`, separated by commas.
        values: values whose classes it may name.
    """
    if "Paradigm." in written:
        yield "from seqmix import Paradigm"
    if "torch." in written:
        yield "import torch"
    yield f"from seqmix.testing import {kit}"
    for cls in dict.fromkeys(_classes(values)):
        # a field at its default is left out, and so the source does not name its class
        if f"{cls.__name__}." in written or f"{cls.__name__}(" in written:
            yield _import(cls)


def _classes(value: Any) -> Iterator[type]:
    """Yield the classes that a value's source may name, except those of the kit."""
    if isinstance(value, Config):
        yield type(value)
        value = [getattr(value, name) for name in type(value).model_fields]
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _classes(item)
    elif isinstance(value, Enum) and not isinstance(value, Paradigm):
        yield type(value)


def _import(cls: type) -> str:
    line = import_line(cls.__module__, cls.__qualname__)
    return line or f"...  # cannot be imported: {cls.__qualname__} of {cls.__module__}"


def import_line(module: str, name: str) -> str | None:
    """Return the line that imports a global of a module; None for a name that cannot be imported."""
    main = sys.modules.get("__main__")
    if module == "__main__":  # other programs import the script that ran by its module name
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec is not None else Path(file).stem if file else ""
    parts = (*module.split("."), name)
    return f"from {module} import {name}" if all(part.isidentifier() for part in parts) else None
