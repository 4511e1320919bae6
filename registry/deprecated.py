"""Functions and parameters with a new name: the old name works for one more minor version, with a warning."""

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def former_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's `__getattr__`, which finds functions under their former names, with a warning.

    Args:
        module: the module's `__name__`.
        names: former names, each with its present name in the same module, or with the full name in another.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {names[name]}", DeprecationWarning, stacklevel=2)
        present_module, _, present = names[name].rpartition(".")
        return getattr(import_module(present_module) if present_module else sys.modules[module], present)

    return find


def former_parameters(**names: str) -> Callable[[Function], Function]:
    """Return a decorator that lets a function accept keywords under their former names, with a warning.

    Args:
        names: present names of the parameters, by their former names.
    """

    def decorate(function: Any) -> Any:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for former in names.keys() & kwargs.keys():
                present = names[former]
                warnings.warn(f"{function.__name__}({former}=) is now {present}=", DeprecationWarning, stacklevel=2)
                kwargs[present] = kwargs.pop(former)
            return function(*args, **kwargs)

        return call

    return decorate
