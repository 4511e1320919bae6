"""Calls of the functions in the native libraries, with the types that their C++ sources declare."""

import ctypes
import re
from collections.abc import Callable
from functools import cache
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....registry import SeqmixError
from . import build

DECLARATION = re.compile(r'extern "C" void (\w+)\(([^)]*)\)')
"""A function in a source: its name and its parameters."""
MISFITS = AttributeError, TypeError, ValueError, RuntimeError
"""Exceptions of `Kind.convert` for an argument of another kind, and of `zip` for a wrong number of arguments."""


class Kind(NamedTuple):
    """Kind of parameter that functions may have."""

    c_type: Any
    """Type in ctypes."""
    convert: Callable[[Any], Any]
    """Returns an argument as a value for ctypes, or raises one of `MISFITS`."""
    expected: str
    """Arguments that fit, in words."""


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _real(x: Any) -> float:
    return x.__float__()  # float() would also read text


POINTER = Kind(ctypes.c_void_p, _address, "a tensor or None")
SCALARS = {
    "int64_t": Kind(ctypes.c_int64, index, "an integer"),
    "double": Kind(ctypes.c_double, _real, "a real number"),
}
"""Kinds of parameters that are not pointers, by C type."""


def call(family: str, name: str, *arguments: Any) -> None:
    """Call a function of a family's library.

    Args:
        family: name of the source.
        name: name of the function.
        arguments: one per parameter of the function: a tensor or None (a null pointer) for a pointer, an integer or
            boolean for `int64_t`, a real number for `double`. The last parameter, torch's number of threads, is added.
            The caller is responsible for dtypes and strides.

    Raises:
        SeqmixError: the number of arguments or the kind of one is wrong, or the library cannot be built.
    """
    function, converters = _function(family, name)
    try:
        values = [convert(x) for convert, x in zip(converters, arguments, strict=True)]
    except MISFITS as error:
        raise SeqmixError(f"{name} of {family}.cpp {_misfit(_parameters(family)[name], arguments)}") from error
    function(*values, torch.get_num_threads())


@cache
def _function(family: str, name: str) -> tuple[Callable[..., None], list[Callable[[Any], Any]]]:
    """Return a function of a library, and the converters of its arguments."""
    kinds = [_kind(parameter) for parameter in _parameters(family)[name]]
    function = getattr(build.library(family), name)
    function.restype = None
    function.argtypes = [kind.c_type for kind in kinds]
    return function, [kind.convert for kind in kinds[:-1]]


@cache
def _parameters(family: str) -> dict[str, list[str]]:
    """Return the parameters of each function as its source declares them, such as "const float* x"."""
    source = (build.SOURCES / f"{family}.cpp").read_text(encoding="utf-8")
    functions = dict(DECLARATION.findall(source))
    return {name: [" ".join(x.split()) for x in parameters.split(",")] for name, parameters in functions.items()}


def _kind(parameter: str) -> Kind:
    return POINTER if "*" in parameter else SCALARS[parameter.split()[0]]


def _misfit(parameters: list[str], arguments: tuple[Any, ...]) -> str:
    """Return what is wrong with the arguments of a call."""
    parameters = parameters[:-1]
    if len(arguments) != len(parameters):
        return f"expects {len(parameters)} arguments, got {len(arguments)}"
    for parameter, argument in zip(parameters, arguments, strict=True):
        kind = _kind(parameter)
        try:
            kind.convert(argument)
        except MISFITS:
            return f"expects {kind.expected} for `{parameter}`, got {type(argument).__name__}"
    raise AssertionError
