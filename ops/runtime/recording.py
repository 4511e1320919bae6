"""Calls of ops recorded during a forward pass, for whoever looks inside a mixer: its heads, decays and weights."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Recorded(NamedTuple):
    """One call of an op whose output is linear in the values: o_n = sum_m w_nm v_m, per head."""

    op: str
    """`softmax`, or the family of a recurrence."""
    v: Tensor
    """[B T*n G V]: n steps per token; G heads, each of which H / G heads of the output read."""
    log_decay: Tensor | None
    """Natural logarithm of the decay, or of the forget gate, <= 0: [H], [B T*n H], [B T*n H K], or None."""
    output: Tensor
    """[B T*n H V]."""


class _Records(threading.local):
    open: tuple[list[Recorded], ...] = ()


_records = _Records()


@contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """A list that gets the calls of ops in this thread while the context is open.

    In eager mode only; calls of a context-parallel group are not recorded.
    """
    before = _records.open
    found = list[Recorded]()
    _records.open = (*before, found)
    try:
        yield found
    finally:
        _records.open = before


def record(op: str, v: Tensor, log_decay: Tensor | None, output: Tensor) -> None:
    """Add a call to the open lists."""
    if not torch.compiler.is_compiling():  # a compiler would make a constant of them
        for found in _records.open:
            found.append(Recorded(op, v, log_decay, output))
