"""Timing side by side: calls take turns in rounds, so that what else a machine does slows all of them.

Figures are medians with the lowest and the highest. A ratio is formed in each round, from calls that ran one after the
other, and then the median is taken: drift over the run cancels.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

Name = TypeVar("Name")


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class TimedCall:
    """Something to be timed."""

    run: Callable[[], Any]
    """What is timed."""
    prepare: Callable[[], Any] = _nothing
    """What is done before every run and is not timed, such as emptying a cache."""
    units: int = 1
    """Steps that one run makes; times are those of one."""


SHORTEST = 5e-3
"""Seconds that a timed call takes at least: beside them, reading the clock and waiting for a device are nothing."""


def lengthened(call: TimedCall, seconds: float) -> TimedCall:
    """The same done several times over, if a unit is short; what must be prepared stays as it is."""
    times = min(100, math.ceil(SHORTEST / max(seconds * call.units, 1e-9)))
    if times <= 1 or call.prepare is not _nothing:
        return call
    return TimedCall(repeated(call.run, times), units=times * call.units)


def repeated(once: Callable[[], Any], times: int) -> Callable[[], None]:
    """The same several times over."""

    def run() -> None:
        for _ in range(times):
            once()

    return run


@dataclass(frozen=True)
class Spread:
    """A median, and how far the samples lie from it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Of at least one sample."""
        return cls(median(samples), min(samples), max(samples))


def interleaved(
    calls: Mapping[Name, TimedCall],
    *,
    repeat: int,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], Any] = _nothing,
    on_call: Callable[[Name], Any] = lambda name: None,  # noqa: ARG005
) -> dict[Name, list[float]]:
    """Seconds a unit of every call in every round, in each of which every call runs once. The calls are warm already.

    `synchronize` waits until the device has done what it was given; `on_call` is given the name of each call before it
    runs.
    """
    samples: dict[Name, list[float]] = {name: [] for name in calls}
    for names in turns(list(calls), repeat):
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
    """The order of each round; the one that begins changes, so nobody always runs after the same neighbour."""
    for index in range(repeat):
        first = index % len(names) if names else 0
        yield [*names[first:], *names[:first]]


def ratio(samples: Sequence[float], reference: Sequence[float]) -> Spread:
    """The quotient of two calls' times, round by round."""
    return Spread.of([a / b for a, b in zip(samples, reference, strict=True)])
