"""A result does not depend on what else there is: other layers, other threads, torch's defaults."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...mixers.contract import SequenceMixer
from ...ops.runtime.memo import Memo
from ...ops.runtime.paradigm import Paradigm
from ..check import check
from ..mixer.case import FIXED, Draw
from ..mixer.trial import Trial

POINTS = 32
"""Places inside a call, of a case that runs in any case, at which another one comes between."""

FEW = 16
"""Such places of what is drawn."""

AT_ONCE = 4
"""Such places in one call."""

PATIENCE = 0.05
"""Seconds that the call waits for the other one, which may wait for a lock that the call holds."""


@check(
    stress=True,
    use="servers with threads, models of several layers, and code under another default dtype",
    share=0.05,
    draw=Draw(tokens=(1, 6), batch_size=(1, 2), lists=((4,),)),
)
def surroundings_change_nothing(trial: Trial) -> None:
    """A call gives the same bits whatever torch's default dtype, in a second layer that shares positions with the
    first, and where another thread's call, of the mixer or of another layer, comes between any two of its operations;
    and the same results with torch's deterministic algorithms."""
    x, other, state, layer = trial.tokens(), trial.tokens(), trial.state(), trial.rebuilt()
    points = POINTS if trial.case.seed == FIXED else FEW
    for paradigm in trial.paradigms:

        def mixed() -> Any:
            return trial.mix(x, state, paradigm=paradigm)  # noqa: B023

        def between(mixer: SequenceMixer) -> None:
            trial.mix(other, None, mixer, paradigm=paradigm)  # noqa: B023

        alone = mixed()
        for dtype in (torch.bfloat16, torch.float64):
            with _default(dtype):
                trial.compare(f"{paradigm}, where {dtype} is torch's default", mixed(), alone, 0)
        memo = Memo()
        with torch.no_grad():
            for place in ("first", "second"):
                what = f"{paradigm}, the {place} of two such layers that share positions against one alone"
                trial.compare(what, trial.mix(x, state, paradigm=paradigm, memo=memo), alone, 0)
        _with_usual_algorithms(trial, paradigm, x)
        with _Between((), mixed) as counted:
            mixed()
        stride = max(1, counted.number // points)
        # of the two that always run, the one from a state at other places than the one from none
        first = (trial.case.seed if state is None else trial.case.seed + stride // 2) % stride
        chosen = range(1 + first, counted.number + 1, stride)
        for number, start in enumerate(range(0, len(chosen), AT_ONCE)):
            several = chosen[start : start + AT_ONCE]  # neighbours: the first of them are anywhere in the call
            with _Between(several, partial(between, (trial.mixer, layer)[number % 2])) as calls:
                found = mixed()
            calls.join()
            places = ", ".join(map(str, several))
            trial.compare(f"{paradigm}, with other calls before its operations {places}", found, alone, 0)


def _with_usual_algorithms(trial: Trial, paradigm: Paradigm, x: Tensor) -> None:
    """Results and gradients, of packed tokens too; elsewhere in these checks torch's algorithms are deterministic."""
    before, packs = trial.state(1), trial.mixer.traits.packing
    packed: dict[str, Any] = {"cu_seqlens": trial.index(0, x.shape[1])} if packs else {}
    call = trial.call(paradigm, **packed)
    expected = trial.differentiate(call, x[:1], before)
    was, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(not was, warn_only=True)
    try:
        trial.compare(f"{paradigm}, with torch's other algorithms", trial.differentiate(call, x[:1], before), expected)
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warns)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Between(TorchFunctionMode):
    """Calls a function in another thread before some of torch's operations, by their numbers from 1."""

    def __init__(self, points: Sequence[int], function: Callable[[], None]) -> None:
        super().__init__()
        self.number, self.points, self.function = 0, frozenset(points), function
        self.called: list[Future[None]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        if self.number in self.points:
            self.called.append(_other_thread(os.getpid()).submit(self.function))
            wait(self.called, PATIENCE)
        return func(*args, **(kwargs or {}))

    def join(self) -> None:
        """Waits for what was called, and raises what it raised."""
        for call in self.called:
            call.result()


@cache
def _other_thread(process: int) -> ThreadPoolExecutor:  # noqa: ARG001  a fork has no threads
    """One for all: what libraries hold for a thread outlives it."""
    return ThreadPoolExecutor(max_workers=1)
