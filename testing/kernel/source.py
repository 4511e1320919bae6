"""A kernel as the Python that finds or makes it, for reports."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from ...ops.runtime.kernel import KERNELS, Kernel
from ..engine.source import call_source, given, import_line

OF_SEQMIX = __name__.partition(".")[0]


@dataclass(frozen=True)
class _Global:
    """A function as its name in a module."""

    written: str
    """As `source` has it."""
    imported: str | None
    """The line that imports it; None where it is no global of a module."""


def kernel_source(kernel: Kernel) -> list[str]:
    """Lines that make the name `kernel`: found by its name if seqmix declares it, imported from a module that has it,
    or made of functions that can be imported. Where none of that is so, a comment says what is missing."""
    key = kernel.key
    if KERNELS.get(key) is kernel and _module(kernel.function).partition(".")[0] == OF_SEQMIX:
        name = f'find("{key.op}", Paradigm.{key.paradigm.name}, "{key.backend}")'
        return ["from seqmix.ops.kernels import find", f"kernel = {name}"]
    for line, name in _variables(kernel):
        return [line if name == "kernel" else f"{line} as kernel"]
    declared = {field.name: field.default for field in fields(Kernel)}
    values = given({name: getattr(kernel, name) for name in declared}, declared)
    named = {name: _global(value) for name, value in values.items() if callable(value)}
    if missing := [value.written for value in named.values() if value.imported is None]:
        return [f"kernel = ...  # the one that was checked: {missing[0]} is no global of a module to import it from"]
    lines = [line for value in named.values() if (line := value.imported)]
    return ["from seqmix.ops.kernels import Kernel", *lines, f"kernel = {call_source('Kernel', values | named)}"]


def _variables(kernel: Kernel) -> Iterator[tuple[str, str]]:
    """The globals that are the kernel, its function's module first: the line that imports each, and its name."""
    own = _module(kernel.function)
    for module in sorted(sys.modules, key=lambda name: name != own):
        if module.partition(".")[0] not in (OF_SEQMIX, "torch"):
            names = [name for name, value in list(vars(sys.modules[module]).items()) if value is kernel]
            yield from ((line, name) for name in names if (line := import_line(module, name)))


def _global(function: Callable[..., Any]) -> _Global:
    module, name = _module(function), getattr(function, "__qualname__", type(function).__name__)
    there = getattr(sys.modules.get(module), name, None) is function
    return _Global(name, import_line(module, name) if there else None)


def _module(function: Callable[..., Any]) -> str:
    return getattr(function, "__module__", None) or ""
