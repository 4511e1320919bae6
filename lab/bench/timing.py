"""Interleaved timing: every round runs every call once, so that other load on the machine slows all calls alike.

Figures are medians, with the lowest and the highest sample. Ratios are computed within each round, from calls that ran
shortly after each other, before the median is taken: drift over the run cancels.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

Name = TypeVar("Name")


def _do_nothing() -> None:
    pass


@dataclass(frozen=True)
class TimedCall:
    """A function to time, and its preparation."""

    run: Callable[[], Any]
    """Function that is timed."""
    prepare: Callable[[], Any] = _do_nothing
    """Function called before every run and not timed, such as one that empties a cache."""
    units: int = 1
    """Number of steps that one run makes; times are reported per step."""


MIN_ROUNDS = 5
"""Minimum number of rounds, whatever the time budget."""
MIN_SECONDS = 5e-3
"""Minimum duration of a timed call, in seconds: it makes the cost of the clock and of synchronization negligible."""


def lengthen(call: TimedCall, seconds: float) -> TimedCall:
    """Return a call that repeats a short one so often that it takes `MIN_SECONDS`; `seconds` is the time per step.

    A call with a preparation is returned unchanged: it must be prepared before every run.
    """
    times = min(100, math.ceil(MIN_SECONDS / max(seconds * call.units, 1e-9)))
    if times <= 1 or call.prepare is not _do_nothing:
        return call
    return TimedCall(repeat_call(call.run, times), units=times * call.units)


def repeat_call(once: Callable[[], Any], times: int) -> Callable[[], None]:
    """Return a function that calls `once` several times."""

    def run() -> None:
        for _ in range(times):
            once()

    return run


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of samples."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Return the median, lowest and highest of the samples, of which there must be at least one."""
        return cls(median(samples), min(samples), max(samples))


def time_interleaved(
    calls: Mapping[Name, TimedCall],
    *,
    repeat: int,
    end: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], Any] = _do_nothing,
    on_call: Callable[[Name], Any] = lambda name: None,  # noqa: ARG005
) -> dict[Name, list[float]]:
    """Time calls in rounds, each of which runs every call once; return the seconds per step of each call, by round.

    The calls must be warmed up. After the time `end` of `time.monotonic`, no further round begins, once there are
    `MIN_ROUNDS`. `synchronize` waits until the device is idle; `on_call` gets the name of each call
    before it runs.
    """
    samples: dict[Name, list[float]] = {name: [] for name in calls}
    for number, names in enumerate(turns(list(calls), repeat)):
        if number >= MIN_ROUNDS and time.monotonic() >= end:
            break
        for name in names:
            call = calls[name]
            on_call(name)
            call.prepare()
            synchronize()
            began = clock()
            call.run()
            synchronize()
            samples[name].append((clock() - began) / call.units)
    return samples


def turns(names: Sequence[Name], repeat: int) -> Iterator[Sequence[Name]]:
    """Yield the names in the order of each round, which rotates, so that each call comes first in some round."""
    for index in range(repeat):
        first = index % len(names) if names else 0
        yield [*names[first:], *names[:first]]


def ratio(samples: Sequence[float], reference: Sequence[float]) -> Spread:
    """Divide the times of a call by those of a reference, round by round."""
    return Spread.of([a / b for a, b in zip(samples, reference, strict=True)])
