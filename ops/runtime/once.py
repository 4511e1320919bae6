"""What several layers form of the same positions and constants is formed once in a call of a model.

What no tensor decides, or the parameters alone, a decoder forms once for all its steps.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
Formed: TypeAlias = dict[Hashable, tuple[Any, Any]]
"""Results and arguments, by form and arguments."""


class _Memory(threading.local):
    formed: Formed | None = None
    constants: Formed | None = None


_memory = _Memory()


@contextmanager
def formed_once() -> Iterator[None]:
    """Inside this context, in this thread, `once` remembers; what it remembers ends with the context.

    Without gradients and in eager mode only: a graph of a backward pass would have parts of several layers in common.
    """
    before, _memory.formed = _memory.formed, None if torch.is_grad_enabled() else {**(_memory.constants or {})}
    try:
        yield
    finally:
        _memory.formed = before


@contextmanager
def constants_kept(constants: Formed) -> Iterator[None]:
    """Inside this context, in this thread, what `once` forms of no tensor is kept in `constants`, from call to call."""
    before, _memory.constants = _memory.constants, constants
    try:
        yield
    finally:
        _memory.constants = before


def once(form: Callable[..., R], *args: Any) -> R:
    """form(*args), a function of its arguments alone (a method: of its module's parameters too), which nobody writes.

    A tensor is the same argument if it is the same object, or holds the same positions [N] on a CPU: each layer's state
    has a leaf of its own. Everything else is compared by value.
    """
    if torch.compiler.is_compiling() or (formed := _memory.formed) is None:
        return form(*args)
    if torch._C._are_functorch_transforms_active():  # whose tensors hide what they hold
        return form(*args)
    key = (form, *[x if not isinstance(x, Tensor) else id(x) if x.is_floating_point() else _named(x) for x in args])
    if (known := formed.get(key)) is None:
        known = formed[key] = (form(*args), args)  # as long as arguments live, none has the identity of another
        if _memory.constants is not None and not any(isinstance(x, Tensor) for x in args):
            _memory.constants[key] = known
    return known[0]


def _named(x: Tensor) -> Hashable:
    """What tells a tensor from others."""
    if type(x) is Tensor and x.ndim == 1 and x.dtype == torch.int64 and x.is_cpu and x.numel() <= FEW:
        return tuple(x.tolist())
    return id(x)


FEW = 64
"""Integers that are compared: more cost as much as what is formed of them."""
