"""Errors in the code of plug-ins: methods with the wrong parameters, and the line that raised an exception."""

import inspect
import sys
import traceback
from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Any

from .errors import ConfigError, SeqmixError
from .providers import path_of

_LIBRARIES = {*sys.stdlib_module_names, "hypothesis", "jaxtyping", "pydantic", "pydantic_core", "seqmix", "torch"}
"""Packages whose code is not a plug-in author's."""
_CALLERS = ("seqmix.testing.", "seqmix.mixers.base.contract")
"""Prefixes of the modules that call mixers: they are not the place to look for an error."""


def require_signatures(cls: type) -> None:
    """Check that a class defines abstract methods of its bases with the parameters that they are called with.

    Raises:
        ConfigError: a method does not accept them; the message has both signatures.
    """
    for name, method in vars(cls).items():
        declared = next((vars(base)[name] for base in cls.__mro__[1:] if _is_abstract(vars(base).get(name))), None)
        if declared is None or not inspect.isfunction(method):
            continue
        expected, actual = signature(declared), signature(method)
        by_name = {p.name: None for p in expected.parameters.values() if p.kind is Parameter.KEYWORD_ONLY}
        try:
            actual.bind(*[None] * (len(expected.parameters) - len(by_name)), **by_name)
        except TypeError:
            raise ConfigError(
                f"{place_of(method)} must take {_parameters(expected)}, got {_parameters(actual)}"
            ) from None


def _is_abstract(member: Any) -> bool:
    return inspect.isfunction(member) and getattr(member, "__isabstractmethod__", False)


def _parameters(of: Signature) -> str:
    """Return a signature without annotations: `(self, x, call)`."""
    parameters = [parameter.replace(annotation=Parameter.empty) for parameter in of.parameters.values()]
    return str(Signature(parameters))


def place_of(method: Callable[..., Any]) -> str:
    """Return a method with its class, file and line: `Mine.mix (mine.py:12)`."""
    code = inspect.unwrap(method).__code__
    return f"{method.__qualname__} ({code.co_filename}:{code.co_firstlineno})"


def explain_plug_in(error: Exception) -> SeqmixError | None:
    """Return an exception of a plug-in's method as one sentence; None if no plug-in's method was running."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = type(frame.f_locals.get("self"))
        extends_ours = any(_package(base) == "seqmix" for base in owner.__mro__)
        if extends_ours and _package(owner) not in _LIBRARIES:
            return SeqmixError(f"{path_of(owner)} {where_raised(error)}")
    return None


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def where_raised(error: Exception) -> str:
    """Return one line: the exception, its message, and the place in the code where the author should look.

    The place is the innermost line of the plug-in author's own code; library code that it calls (torch, seqmix) is
    skipped. For a built-in mixer, it is the innermost line of seqmix outside the conformance kit.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in frames]
    authors = [i for i, name in enumerate(modules) if not name.startswith("hypothesis_")]  # a generated module
    authors = [i for i in authors if modules[i].partition(".")[0] not in _LIBRARIES]
    built_in = [i for i, name in enumerate(modules) if name.startswith("seqmix.") and not name.startswith(_CALLERS)]
    frame, line = frames[(authors or built_in or [-1])[-1]]
    text = str(error).strip().splitlines() or [""]
    code = frame.f_code
    return f"raised {type(error).__name__}: {text[0]} ({code.co_filename}:{line}, in {code.co_name})"
