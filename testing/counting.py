"""Counting the matrix products of a call, inside custom ops too."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS  # no public way leads to the function that an op was made of
from torch._ops import HigherOrderOperator, OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

TORCHS_OWN = {"prims", "rngprims", "debug_mode_ops", "onnx"}


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of all matrix products of a call.

    torch counts a custom op as nothing, so the function that it was made of is run and counted instead; a fused
    attention kernel of the CPU too, so the products are done one by one.
    """
    # torch counts baddbmm, but not in place
    formulas = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.baddbmm_: lambda _, x, y, **__: 2 * math.prod(x) * y[-1]}
    ).flop_registry
    bodies = {
        definition._opoverload.overloadpacket: definition._init_fn
        for definition in OPDEFS.values()
        if definition._namespace not in TORCHS_OWN
    }
    with _Counter(formulas, bodies) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.total


class _Counter(TorchDispatchMode):
    """Adds up what torch's formulas give. torch's own mode looks up every op again, which costs ten times as much as a
    small op does."""

    supports_higher_order_operators = True

    def __init__(self, formulas: dict[Any, Callable[..., int]], bodies: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.formulas, self.bodies, self.total = formulas, bodies, 0
        self._runs: dict[int, Callable[..., Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if id(func) not in self._runs:
            self._runs[id(func)] = self._run_of(func)
        return self._runs[id(func)](*args, **(kwargs or {}))

    def _run_of(self, func: Any) -> Callable[..., Any]:
        """What runs and counts an op."""
        if isinstance(func, HigherOrderOperator):
            return partial(self._count_by_torch, func)
        if (body := self.bodies.get(func.overloadpacket)) is not None:
            return partial(self._go_on, body)
        if (formula := self.formulas.get(func.overloadpacket)) is not None:
            return partial(self._count, func, formula)
        if func is torch.ops.aten.matmul.default:
            return self._matmul
        return partial(self._go_on, func.decompose) if func._can_decompose() else func

    def _go_on(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Count what a function calls."""
        with self:
            return function(*args, **kwargs)

    def _count(self, func: OpOverload, formula: Callable[..., int], *args: Any, **kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        self.total += formula(*args, **kwargs, out_val=out)
        return out

    def _matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """Of matrices: taken apart in Python, as other ops are, it would take as long as dozens of them."""
        if min(x.ndim, y.ndim) < 2:
            return self._go_on(torch.ops.aten.matmul.default.decompose, x, y)
        out = torch.ops.aten.matmul.default(x, y)
        self.total += 2 * out.numel() * x.shape[-1]
        return out

    def _count_by_torch(self, func: HigherOrderOperator, *args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            out = func(*args, **kwargs)
        self.total += counter.get_total_flops()
        return out
