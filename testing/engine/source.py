"""Values as the Python that makes them, for reports."""

import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from ...ops.runtime.paradigm import Paradigm
from ...registry import Config


def source(value: Any) -> str:
    """A value as Python that makes it; of a configuration, the fields that are not the default."""
    if isinstance(written := getattr(value, "written", None), str):  # of what has no source
        return written
    if isinstance(value, Config):
        known = type(value).model_fields
        return call_source(type(value).__name__, given(vars(value), {name: f.default for name, f in known.items()}))
    if isinstance(value, Enum):  # a paradigm, or one of a plug-in
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, tuple):
        return f"({', '.join(map(source, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {source(item)}" for name, item in value.items()) + "}"
    return repr(value)


def call_source(function: str, named: Mapping[str, Any], *positional: str) -> str:
    """A call with named arguments, after positional ones that are Python already."""
    return f"{function}({', '.join([*positional, *(f'{name}={source(value)}' for name, value in named.items())])})"


def given(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not the default, in the order of the defaults."""
    return {name: values[name] for name, default in defaults.items() if values[name] != default}


class WrittenCase:
    """A dataclass whose `repr` is Python that makes it."""

    def __repr__(self) -> str:
        """As Python; only what differs from the defaults, which all fields have."""
        return call_source(type(self).__name__, given(vars(self), vars(type(self)())))


def imports(written: str, kit: str, values: Any = ()) -> Iterator[str]:
    """The imports that written Python needs, which uses these names of the kit and the classes of these values."""
    if "Paradigm." in written:
        yield "from seqmix import Paradigm"
    if "torch." in written:
        yield "import torch"
    yield f"from seqmix.testing import {kit}"
    for cls in dict.fromkeys(_classes(values)):
        if f"{cls.__name__}." in written or f"{cls.__name__}(" in written:  # a field that has its default is not
            yield _import(cls)


def _classes(value: Any) -> Iterator[type]:
    """The classes that a value's source names, but for those of the kit."""
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
    return line or f"...  # {cls.__qualname__} of {cls.__module__}, which cannot be imported"


def import_line(module: str, name: str) -> str | None:
    """The line that imports a module's global; None of what is no module's global."""
    main = sys.modules.get("__main__")
    if module == "__main__":  # of the script that ran, which is a module to others
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec is not None else Path(file).stem if file else ""
    parts = (*module.split("."), name)
    return f"from {module} import {name}" if all(part.isidentifier() for part in parts) else None
