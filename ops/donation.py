"""Donation: whether an op may overwrite the state that it is given, because its owner does not need it again."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Permission(threading.local):
    given = False


_permission = _Permission()


@contextmanager
def donate_state() -> Iterator[None]:
    """Inside this context, in this thread, an op may write the next state in place of the one it is given.

    Only without gradients, and in eager mode: compiled code ignores it.
    """
    before, _permission.given = _permission.given, True
    try:
        yield
    finally:
        _permission.given = before


def may_overwrite() -> bool:
    """Whether the given state may be overwritten."""
    # a compiler would make a constant of the flag
    return not torch.compiler.is_compiling() and _permission.given and not torch.is_grad_enabled()
