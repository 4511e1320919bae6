"""Reduce a failing case step by step, as long as it fails with the same type of error."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from hypothesis.errors import UnsatisfiedAssumption

ATTEMPTS, SECONDS = 200, 10.0
"""Limits of one reduction: number of simpler cases tried, and time in seconds."""

C = TypeVar("C")


def shrink(
    attempt: Callable[[C], None], case: C, error: Exception, simpler: Callable[[C], Iterable[C]]
) -> tuple[C, Exception]:
    """Return a simpler case that raises an exception of the same type, and that exception.

    Each simpler case that still fails is the start of the next step. If no simpler case fails, the result is `case` and
    `error`.
    """
    seen, end = {repr(case)}, time.monotonic() + SECONDS
    candidates = iter(simpler(case))
    while (candidate := next(candidates, None)) is not None and len(seen) <= ATTEMPTS and time.monotonic() < end:
        if repr(candidate) in seen:
            continue
        seen.add(repr(candidate))
        try:
            attempt(candidate)
        except UnsatisfiedAssumption:  # the subject refuses this case
            continue
        except Exception as other:
            if type(other) is type(error):
                case, error, candidates = candidate, other, iter(simpler(candidate))
    return case, error


def fewer(number: int, least: int) -> Iterator[int]:
    """Yield numbers below `number`: `least` first, then ever closer to `number`."""
    step = number - least
    while step > 0:
        yield number - step
        step //= 2
