"""Check that results do not depend on their surroundings: other layers, other threads, torch's global settings."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...mixers.base.contract import SequenceMixer
from ...mixers.base.layer_call import LayerCall
from ...mixers.base.state import clone
from ...ops.runtime.memo import Memo
from ...ops.runtime.paradigm import Paradigm
from ..check import check
from ..mixer.case import FIXED, Draw
from ..mixer.trial import Trial

POINTS = 32
"""Approximate number of operations of a fixed case before which another thread's call runs."""

FEW = 16
"""Approximate number of operations of a drawn case before which another thread's call runs."""

AT_ONCE = 4
"""Number of operations of one call before which another thread's call runs."""

PATIENCE = 0.05
"""Seconds to wait for the other thread's call, which may itself be waiting for a lock of the interrupted call."""


@check(
    stress=True,
    use="threaded servers, models of several layers, and code with another default dtype: results change",
    share=0.05,
    draw=Draw(tokens=(1, 6), batch_size=(1, 2), lists=((4,),)),
)
def surroundings_change_nothing(trial: Trial) -> None:
    """A call gives the same bits with any default dtype of torch, in a second layer that shares positions with the
    first, and while another thread calls the mixer or another layer between any two of its operations. It gives the
    same results with and without torch's deterministic algorithms."""
    x, other, state, layer = trial.tokens(), trial.tokens(), trial.state(), trial.rebuilt()
    points = POINTS if trial.case.seed == FIXED else FEW
    for paradigm in trial.paradigms:

        def mix() -> Any:
            return trial.mix(x, state, paradigm=paradigm)  # noqa: B023

        def mix_other(mixer: SequenceMixer) -> None:
            trial.mix(other, None, mixer, paradigm=paradigm)  # noqa: B023

        alone = mix()
        for dtype in (torch.bfloat16, torch.float64):
            with _default_dtype(dtype):
                trial.compare(f"{paradigm}, with {dtype} as torch's default dtype", mix(), alone, 0)
        memo = Memo()
        with torch.no_grad():
            for place in ("first", "second"):
                what = f"{paradigm}, the {place} of two equal layers that share positions against one alone"
                before = None if state is None else clone(state)
                used = paradigm if state is None else trial.after(paradigm)
                call = LayerCall(before, used, return_state=trial.mixer.traits.has_state, memo=memo)
                result = trial.mixer(x, call=call)
                trial.compare(what, (result.y, result.state), alone, 0)
        _compare_deterministic_algorithms(trial, paradigm, x)
        with _Interleaved((), mix) as counted:
            mix()
        stride = max(1, counted.number // points)
        # the fixed case with a state interrupts other operations than the one without
        first = (trial.case.seed if state is None else trial.case.seed + stride // 2) % stride
        chosen = range(1 + first, counted.number + 1, stride)
        for number, start in enumerate(range(0, len(chosen), AT_ONCE)):
            operations = chosen[start : start + AT_ONCE]  # consecutive ones: each group covers another part of the call
            with _Interleaved(operations, partial(mix_other, (trial.mixer, layer)[number % 2])) as calls:
                interleaved = mix()
            calls.join()
            numbers = ", ".join(map(str, operations))
            trial.compare(f"{paradigm}, with other calls before its operations {numbers}", interleaved, alone, 0)


def _compare_deterministic_algorithms(trial: Trial, paradigm: Paradigm, x: Tensor) -> None:
    """Compare results and gradients with and without torch's deterministic algorithms; packed, if the mixer can pack.

    Other checks run with deterministic algorithms alone.
    """
    before, packs = trial.state(1), trial.mixer.traits.packing
    packed: dict[str, Any] = {"cu_seqlens": trial.index(0, x.shape[1])} if packs else {}
    call = trial.call(paradigm, **packed)
    expected = trial.differentiate(call, x[:1], before)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(not deterministic, warn_only=True)
    try:
        what = f"{paradigm}, {'without' if deterministic else 'with'} torch's deterministic algorithms"
        trial.compare(what, trial.differentiate(call, x[:1], before), expected)
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype within the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Interleaved(TorchFunctionMode):
    """A mode that calls a function in another thread before the operations `points` of torch, numbered from 1."""

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
        """Wait for the calls in the other thread; raise the error of one that failed."""
        for call in self.called:
            call.result()


@cache
def _other_thread(process: int) -> ThreadPoolExecutor:  # noqa: ARG001  a forked process needs its own thread
    """Return a single thread for all calls: libraries keep memory per thread, which outlives the thread."""
    return ThreadPoolExecutor(max_workers=1)
