"""Support for modules and functions with a new name: the old one works for one more minor version, with a warning."""

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

MODULES: Mapping[str, str] = {
    "seqmix.ops.autograd": "seqmix.ops.runtime.custom_op",
    "seqmix.ops.call": "seqmix.ops.runtime.call",
    "seqmix.ops.chunkwise": "seqmix.ops.recurrence.chunk_loop",
    "seqmix.ops.packing": "seqmix.ops.runtime.packing",
    "seqmix.ops.paradigm": "seqmix.ops.runtime.paradigm",
    "seqmix.ops.recurrent": "seqmix.ops.recurrence.token_loop",
    "seqmix.ops.softmax": "seqmix.ops.attention",
    "seqmix.ops.softmax.api": "seqmix.ops.attention.api",
    "seqmix.ops.softmax.cache": "seqmix.ops.attention.kv_cache",
    "seqmix.training.averaging": "seqmix.training.checkpoint.averaging",
    "seqmix.training.errors": "seqmix.training.checkpoint.errors",
    "seqmix.training.events": "seqmix.training.monitoring.events",
    "seqmix.training.loggers": "seqmix.training.monitoring.loggers",
    "seqmix.training.optim": "seqmix.training.optimizer",
    "seqmix.training.saved_prompt_cache": "seqmix.training.checkpoint.saved_prompt_cache",
    "seqmix.training.saved_run": "seqmix.training.checkpoint.saved_run",
}
"""Public modules of version 0.2, each with its present name. To be removed in 0.4."""


class _Finder(MetaPathFinder, Loader):
    """Import hook for former module names: the imported module looks up every name in the present module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname not in MODULES:
            return None
        return ModuleSpec(fullname, self, is_package=any(name.startswith(f"{fullname}.") for name in MODULES))

    def exec_module(self, module: ModuleType) -> None:
        present_name = MODULES[module.__name__]
        sentence = f"{module.__name__} is now {present_name}: import it from there"
        warnings.warn(sentence, DeprecationWarning, stacklevel=2)
        present = importlib.import_module(present_name)
        vars(module)["__getattr__"] = lambda name: getattr(present, name)


def find_moved_modules() -> None:
    """Install the import hook, so that Python finds the modules of `MODULES` under their former names."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def former_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's `__getattr__`, which finds functions under their former names, with a warning.

    Args:
        module: the module's `__name__`.
        names: former names, each with its present name in the same module.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {names[name]}", DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], names[name])

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
