"""Importing what a command needs: torch's modules are a million objects, and none of them goes before the process."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """What is made meanwhile is not searched for garbage, again and again, which takes a fifth of an import's time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
