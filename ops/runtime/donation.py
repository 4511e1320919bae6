"""Donation: whether an op may overwrite the state that it is given, because its owner does not need it again."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Permission(threading.local):
    given = compiled = False


_permission = _Permission()


@contextmanager
def donate_state(*, compiled: bool = False) -> Iterator[None]:
    """Inside this context, in this thread, an op may write the next state in place of the one it is given.

    Only without gradients. A compiler makes a constant of the permission: `compiled` gives it to graphs as well, and
    whatever is compiled inside must then be called inside such a context alone.
    """
    before = _permission.given, _permission.compiled
    _permission.given, _permission.compiled = True, compiled
    try:
        yield
    finally:
        _permission.given, _permission.compiled = before


def may_overwrite() -> bool:
    """Whether the given state may be overwritten."""
    given = _permission.compiled if torch.compiler.is_compiling() else _permission.given
    return given and not torch.is_grad_enabled()
