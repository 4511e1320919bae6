"""A result does not depend on what else there is: other layers, other threads, torch's defaults."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...ops.once import formed_once
from ..check import check
from ..mixer_case import Draw
from ..mixer_trial import Trial

POINTS = 8
"""Places inside a call, of each case, at which another one comes between."""


@check(
    use="servers with threads, models of several layers, and code under another default dtype",
    share=0.1,
    draw=Draw(tokens=(1, 6), batch_size=(1, 2)),
)
def surroundings_change_nothing(trial: Trial) -> None:
    """A call gives the same bits whatever torch's default dtype, in a second layer that shares positions with the
    first, and where another call of the mixer comes between any two of its operations, as another thread's does."""
    x, other, state = trial.tokens(), trial.tokens(), trial.state()
    for paradigm in trial.paradigms:

        def mixed() -> Any:
            return trial.mix(x, state, paradigm=paradigm)  # noqa: B023

        def between() -> None:
            trial.mix(other, None, paradigm=paradigm)  # noqa: B023

        alone = mixed()
        for dtype in (torch.bfloat16, torch.float64):
            with _default(dtype):
                trial.compare(f"{paradigm}, where {dtype} is torch's default", mixed(), alone, 0)
        with torch.no_grad(), formed_once():
            for layer in ("first", "second"):
                what = f"{paradigm}, the {layer} of two such layers that share positions against one alone"
                trial.compare(what, mixed(), alone, 0)
        with _Between(0, between) as counted:
            mixed()
        stride = max(1, -counted.left // POINTS)
        for point in range(1 + trial.case.seed % stride, -counted.left + 1, stride):
            with _Between(point, between):
                found = mixed()
            trial.compare(f"{paradigm}, with another call before its operation {point}", found, alone, 0)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Between(TorchFunctionMode):
    """Calls a function before one of torch's operations, by its number from 1; it counts what it sees down."""

    def __init__(self, point: int, function: Callable[[], None]) -> None:
        super().__init__()
        self.left, self.function = point, function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            self.function()
        return func(*args, **(kwargs or {}))
