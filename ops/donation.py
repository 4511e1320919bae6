"""Whether the state that an op is given may be overwritten: where its owner says that it is not needed again."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Permission(threading.local):
    given = False


_permission = _Permission()


@contextmanager
def donate_state() -> Iterator[None]:
    """In here, in this thread, whoever is given a state may write the next one in its place.

    Without gradients only; and not in compiled code, which never looks.
    """
    before, _permission.given = _permission.given, True
    try:
        yield
    finally:
        _permission.given = before


def may_overwrite() -> bool:
    """Whether the state that is given is not needed again."""
    # a compiler would take what it sees for a constant, and keep it
    return not torch.compiler.is_compiling() and _permission.given
