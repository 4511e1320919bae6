"""Cache of results that several layers of a model, or several steps of a decoder, have in common.

A memo travels in a `Call`. A model creates one for each forward pass, in eager mode and without gradients only: with
gradients, the backward pass of one layer would go through parts of another layer's graph, and a compiler finds common
results by itself. A decoder passes the same memo to all its steps, which then share the results that depend on no
tensor other than parameters.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")

MAX_COMPARED = 64
"""Maximum number of integers in a tensor that is compared by value; comparing more costs as much as recomputing."""


class Memo:
    """Cache of results by function and arguments.

    Results live for one forward pass; constants, which have no tensor among their arguments, live as long as the memo.
    """

    def __init__(self) -> None:
        self._constants: dict[Hashable, tuple[Any, Any]] = {}
        self._results: dict[Hashable, tuple[Any, Any]] = {}

    def next_pass(self) -> "Memo":
        """Start a forward pass: discard all results except constants, and return this memo."""
        self._results = dict(self._constants)
        return self

    def once(self, function: Callable[..., R], *args: Any) -> R:
        """Return function(*args), computed at the first call with these arguments; do not write to the result.

        Args:
            function: a function that depends on its arguments alone, or a method that reads only parameters of its
                module.
            args: arguments. Two tensors are equal if they are the same object, or hold the same few integers [N] on a
                CPU (every layer's state has its own tensor for the same position). Other arguments are compared by
                value.
        """
        # a compiler finds common results by itself; values of functorch's tensors cannot be read
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return function(*args)
        key = (function, *[_identity(x) if isinstance(x, Tensor) else x for x in args])
        if (known := self._results.get(key)) is None:
            # arguments are stored too: while a tensor is alive, no other tensor has its id
            known = self._results[key] = (function(*args), args)
            if not any(isinstance(x, Tensor) for x in args):
                self._constants[key] = known
        return known[0]


def once(memo: Memo | None, function: Callable[..., R], *args: Any) -> R:
    """Return function(*args), from the memo if there is one."""
    return function(*args) if memo is None else memo.once(function, *args)


def _identity(x: Tensor) -> Hashable:
    """Return the key of a tensor: its values if it holds few integers on a CPU, else its id."""
    if x.is_floating_point():
        return id(x)
    if type(x) is Tensor and x.ndim == 1 and x.dtype == torch.int64 and x.is_cpu and x.numel() <= MAX_COMPARED:
        return tuple(x.tolist())
    return id(x)
