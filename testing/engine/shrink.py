"""Reducing a case that fails, step by step, as long as the same fails."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from hypothesis.errors import UnsatisfiedAssumption

ATTEMPTS, SECONDS = 200, 10.0
"""What reducing a case may take."""

C = TypeVar("C")


def shrink(
    attempt: Callable[[C], None], case: C, error: Exception, simpler: Callable[[C], Iterable[C]]
) -> tuple[C, Exception]:
    """The first simpler case that raises an exception of the same type, and so on from there, with its exception."""
    seen, end = {repr(case)}, time.monotonic() + SECONDS
    candidates = iter(simpler(case))
    while (candidate := next(candidates, None)) is not None and len(seen) <= ATTEMPTS and time.monotonic() < end:
        if repr(candidate) in seen:
            continue
        seen.add(repr(candidate))
        try:
            attempt(candidate)
        except UnsatisfiedAssumption:  # not a case
            continue
        except Exception as other:
            if type(other) is type(error):
                case, error, candidates = candidate, other, iter(simpler(candidate))
    return case, error


def fewer(number: int, least: int) -> Iterator[int]:
    """The least, and then numbers ever nearer to this one, which is not among them."""
    step = number - least
    while step > 0:
        yield number - step
        step //= 2
