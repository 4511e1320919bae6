"""Python source that finds or creates a kernel, for reports."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from ...ops.runtime.kernel import KERNELS, Kernel
from ..engine.source import call_source, import_line, non_defaults

PACKAGE = __name__.partition(".")[0]
"""Name of this library's package."""


@dataclass(frozen=True)
class _Global:
    """A function that source refers to by its name in a module."""

    written: str
    """Name of the function, as `source` shows it."""
    imported: str | None
    """Line that imports the function; None if it is not a global of a module."""


def kernel_source(kernel: Kernel) -> list[str]:
    """Return lines that assign the kernel to the name `kernel`.

    A kernel that seqmix declares is found by its key. Other kernels are imported from a module that has them as a
    global, or created from functions that can be imported. If that is impossible, a comment tells what is missing.
    """
    key = kernel.key
    if KERNELS.get(key) is kernel and _module(kernel.function).partition(".")[0] == PACKAGE:
        name = f'find("{key.op}", Paradigm.{key.paradigm.name}, "{key.backend}")'
        return ["from seqmix.ops.kernels import find", f"kernel = {name}"]
    for line, name in _variables(kernel):
        return [line if name == "kernel" else f"{line} as kernel"]
    defaults = {field.name: field.default for field in fields(Kernel)}
    values = non_defaults({name: getattr(kernel, name) for name in defaults}, defaults)
    functions = {name: _global(value) for name, value in values.items() if callable(value)}
    if missing := [value.written for value in functions.values() if value.imported is None]:
        return [f"kernel = ...  # the kernel that was checked: {missing[0]} cannot be imported from a module"]
    lines = [line for value in functions.values() if (line := value.imported)]
    return ["from seqmix.ops.kernels import Kernel", *lines, f"kernel = {call_source('Kernel', values | functions)}"]


def _variables(kernel: Kernel) -> Iterator[tuple[str, str]]:
    """Yield the import line and the name of each global that is the kernel, its function's module first."""
    preferred = _module(kernel.function)
    for module in sorted(sys.modules, key=lambda name: name != preferred):
        if module.partition(".")[0] not in (PACKAGE, "torch"):
            names = [name for name, value in list(vars(sys.modules[module]).items()) if value is kernel]
            yield from ((line, name) for name in names if (line := import_line(module, name)))


def _global(function: Callable[..., Any]) -> _Global:
    """Return the name and the import line of a function."""
    module, name = _module(function), getattr(function, "__qualname__", type(function).__name__)
    is_global = getattr(sys.modules.get(module), name, None) is function
    return _Global(name, import_line(module, name) if is_global else None)


def _module(function: Callable[..., Any]) -> str:
    """Return the name of a function's module; "" if it is unknown."""
    return getattr(function, "__module__", None) or ""
