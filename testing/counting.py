"""Count the floating-point operations of a call's matrix products, also inside custom ops."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS  # torch has no public access to the Python function of a custom op
from torch._ops import HigherOrderOperator, OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..ops.runtime.custom_op import BODIES

TORCH_NAMESPACES = {"prims", "rngprims", "debug_mode_ops", "onnx"}
"""Namespaces of torch's own custom ops."""


def count_flops(call: Callable[[], Any]) -> int:
    """Return the floating-point operations of all matrix products of a call.

    torch's counter gives 0 for a custom op, so the op's Python function is run and counted instead. It gives 0 for a
    fused attention kernel on the CPU too, so attention runs as separate matrix products.
    """
    # torch has a formula for baddbmm, not for its in-place form
    formulas = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.baddbmm_: lambda _, x, y, **__: 2 * math.prod(x) * y[-1]}
    ).flop_registry
    bodies = BODIES | {
        definition._opoverload.overloadpacket: definition._init_fn
        for definition in OPDEFS.values()
        if definition._namespace not in TORCH_NAMESPACES
    }
    with _Counter(formulas, bodies) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.total


class _Counter(TorchDispatchMode):
    """A dispatch mode that adds up the operations by torch's formulas.

    `FlopCounterMode` looks every op up again at each call, which takes ten times as long as a small op itself.
    """

    supports_higher_order_operators = True

    def __init__(self, formulas: dict[Any, Callable[..., int]], bodies: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.formulas, self.bodies, self.total = formulas, bodies, 0
        self._handlers: dict[int, Callable[..., Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if id(func) not in self._handlers:
            self._handlers[id(func)] = self._make_handler(func)
        return self._handlers[id(func)](*args, **(kwargs or {}))

    def _make_handler(self, func: Any) -> Callable[..., Any]:
        """Return the function that runs an op and counts its operations."""
        if isinstance(func, HigherOrderOperator):
            return partial(self._count_by_torch, func)
        if (body := self.bodies.get(func.overloadpacket)) is not None:
            return partial(self._count_inside, body)
        if (formula := self.formulas.get(func.overloadpacket)) is not None:
            return partial(self._count, func, formula)
        if func is torch.ops.aten.matmul.default:
            return self._matmul
        return partial(self._count_inside, func.decompose) if func._can_decompose() else func

    def _count_inside(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function and count the ops that it calls."""
        with self:
            return function(*args, **kwargs)

    def _count(self, func: OpOverload, formula: Callable[..., int], *args: Any, **kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        self.total += formula(*args, **kwargs, out_val=out)
        return out

    def _matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """Run and count a product of matrices directly: decomposing matmul in Python takes as long as dozens of ops."""
        if min(x.ndim, y.ndim) < 2:
            return self._count_inside(torch.ops.aten.matmul.default.decompose, x, y)
        out = torch.ops.aten.matmul.default(x, y)
        self.total += 2 * out.numel() * x.shape[-1]
        return out

    def _count_by_torch(self, func: HigherOrderOperator, *args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            out = func(*args, **kwargs)
        self.total += counter.get_total_flops()
        return out
