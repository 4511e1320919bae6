"""Counting the matrix products of a call, inside custom ops too."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS  # no public way leads to the function that an op was made of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

TORCHS_OWN = {"prims", "rngprims", "debug_mode_ops", "onnx"}


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of all matrix products of a call, without gradients.

    torch counts a custom op, and a fused attention kernel of the CPU, as nothing: the function that the op was made of
    runs instead, and attention as products.
    """
    with torch.no_grad(), _Counter() as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.flops


@cache
def _is_composite(op: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


class _Counter(TorchDispatchMode):
    """torch's formulas, summed over all ops that run; torch's own counter also keeps a tally by module, which costs
    three times as much as what it counts here."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        own = [op for op in OPDEFS.values() if op._namespace not in TORCHS_OWN]
        self.bodies = {op._opoverload.overloadpacket: op._init_fn for op in own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return NotImplemented
        packet = func.overloadpacket
        if body := self.bodies.get(packet):
            with self:
                return body(*args, **kwargs)
        if packet not in flop_registry and _is_composite(func):  # a body runs below autograd, which would decompose it
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if packet is torch.ops.aten.baddbmm_:  # torch counts baddbmm, but not in place
            self.flops += 2 * math.prod(args[1].shape) * args[2].shape[-1]
        elif formula := flop_registry.get(packet):
            self.flops += formula(*args, **kwargs, out_val=result)
        return result
