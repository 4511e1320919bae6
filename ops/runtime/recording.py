"""Recording of op calls during a forward pass, to inspect the heads, decays and weights of a mixer."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class OpCall(NamedTuple):
    """One recorded call of an op whose output is linear in the values: o_n = sum_m w_nm v_m, per head."""

    op: str
    """Name of the op: `softmax`, or the family of a recurrence."""
    v: Tensor
    """Values [B T*n G V], with n steps per token; H / G heads of the output read each of the G heads."""
    log_decay: Tensor | None
    """Natural logarithm of the decay, or of the forget gate, <= 0: [H], [B T*n H], [B T*n H K], or None."""
    output: Tensor
    """Output [B T*n H V]."""


class _Records(threading.local):
    open: tuple[list[OpCall], ...] = ()


_records = _Records()


@contextmanager
def recorded() -> Iterator[list[OpCall]]:
    """Record the op calls of this thread while the context is open, in the list that it yields.

    Calls in compiled code or in a context-parallel group are not recorded.
    """
    before = _records.open
    calls = list[OpCall]()
    _records.open = (*before, calls)
    try:
        yield calls
    finally:
        _records.open = before


def record(op: str, v: Tensor, log_decay: Tensor | None, output: Tensor) -> None:
    """Append a call to the list of each `recorded` context of this thread that is open."""
    if not torch.compiler.is_compiling():  # a compiler would treat the lists as constants
        for calls in _records.open:
            calls.append(OpCall(op, v, log_decay, output))
