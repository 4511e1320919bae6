"""Helpers of all native kernels: limits, and sequences as ranges of tokens."""

from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor

from ...runtime.custom_op import has_tangent, is_recorded, needs_grad
from ...runtime.kernel import Probe
from ...runtime.packing import read_boundaries
from . import build

BLOCK = 64
"""Channels of a task, as in common.h."""
GROUPS = 8
"""Maximum number of groups that sequences are divided into; each group sums its own gradients of weights."""


def limits_of(family: str) -> Callable[[Probe], list[str]]:
    """Return the limits of a family's kernels: a CPU, and a compiler that can build them."""

    def limits(probe: Probe) -> list[str]:
        if probe.device.type != "cpu":
            return [f"native kernels run on a CPU, got {probe.device}"]
        reason = build.failure(family)
        return [] if reason is None else [reason]

    return limits


def is_untracked(*tensors: Tensor | None) -> bool:
    """True if nothing records what is done with these tensors, so that a compiled function may read their memory.

    Besides what `is_recorded` names, autograd records operations, and views that negate (the imaginary part of a
    conjugate) have the memory of other numbers.
    """
    if is_recorded(*tensors) or needs_grad(*tensors) or has_tangent(*tensors):
        return False
    for x in tensors:  # noqa: SIM110  a generator costs a call per tensor, in every step of decoding
        if x is not None and x.is_neg():
            return False
    return True


CHUNK = 32
"""Tokens between the states that selective.cpp and diagonal.cpp save for the backward pass."""


def saved_states(x: Tensor, cu_seqlens: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Allocate the states before all chunks of all sequences, [chunks *shape], float32.

    It is filled with zeros, because sequences may use fewer rows than are allocated, and an op's outputs must be
    defined everywhere.
    """
    chunks = x.shape[0] * x.shape[1] // CHUNK + rows(x, cu_seqlens)
    return x.new_zeros((chunks, *shape), dtype=torch.float32)


def rows(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return the number of sequences N: rows of x [B T ..] or packed documents."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def sequences(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return where sequences begin and end among the B T tokens of x: rows or packed documents, int64 [N+1].

    Raises:
        SeqmixError: the boundaries do not rise from 0 to the number of tokens.
    """
    if cu_seqlens is None:
        return torch.arange(x.shape[0] + 1) * x.shape[1]
    return torch.tensor(read_boundaries(cu_seqlens, x.shape[1]))


@overload
def contiguous(x: Tensor) -> Tensor: ...
@overload
def contiguous(x: Tensor | None) -> Tensor | None: ...
def contiguous(x: Tensor | None) -> Tensor | None:
    """Return a tensor as contiguous float32: the tensor itself if it is that already, else a copy. None stays None."""
    return None if x is None else x.to(torch.float32).contiguous()
