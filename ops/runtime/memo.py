"""Results that several layers of a model, or several steps of a decoder, have in common: computed once, used by all.

A memo travels in a `Call`. A model makes one for each of its forward passes, in eager mode and without gradients only:
the backward pass of one layer would otherwise go through parts of another's graph, and a compiler finds what is common
by itself. A decoder hands the same memo to all its steps, which then share what depends on no tensor, or on parameters
alone.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")

FEW = 64
"""Integers of a tensor that are compared by value; comparing more costs as much as what is computed from them."""


class Memo:
    """Results by function and arguments: those of one forward pass, and constants, which stay from pass to pass."""

    def __init__(self) -> None:
        self._constants: dict[Hashable, tuple[Any, Any]] = {}
        self._results: dict[Hashable, tuple[Any, Any]] = {}

    def next_pass(self) -> "Memo":
        """This memo at the start of a forward pass: only constants are left in it."""
        self._results = dict(self._constants)
        return self

    def once(self, function: Callable[..., R], *args: Any) -> R:
        """function(*args), computed at the first call with these arguments; nobody may write to the result.

        Args:
            function: a function of its arguments alone, or a method that reads nothing but its module's parameters.
            args: a tensor is the same argument if it is the same object, or holds the same integers [N] on a CPU (each
                layer's state has a leaf of its own for the position); everything else is compared by value.
        """
        if torch._C._are_functorch_transforms_active():  # whose tensors hide their values
            return function(*args)
        key = (function, *[_identity(x) if isinstance(x, Tensor) else x for x in args])
        if (known := self._results.get(key)) is None:
            # arguments are kept too: as long as a tensor lives, no other has its identity
            known = self._results[key] = (function(*args), args)
            if not any(isinstance(x, Tensor) for x in args):
                self._constants[key] = known
        return known[0]


def once(memo: Memo | None, function: Callable[..., R], *args: Any) -> R:
    """function(*args), by way of a memo if there is one; compiled code finds by itself what is common."""
    if memo is None or torch.compiler.is_compiling():
        return function(*args)
    return memo.once(function, *args)


def _identity(x: Tensor) -> Hashable:
    """Key of a tensor: its values if they are few integers on a CPU, else the object."""
    if x.is_floating_point():
        return id(x)
    if type(x) is Tensor and x.ndim == 1 and x.dtype == torch.int64 and x.is_cpu and x.numel() <= FEW:
        return tuple(x.tolist())
    return id(x)
