"""Counting the matrix products of a call, inside custom ops too."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS  # no public way leads to the function that an op was made of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TORCHS_OWN = {"prims", "rngprims", "debug_mode_ops", "onnx"}


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of all matrix products of a call.

    torch counts a custom op as nothing, so the function that it was made of is counted instead; a fused attention
    kernel of the CPU too, so the products are done one by one.
    """
    # torch counts baddbmm, but not in place
    mapping: dict[Any, Any] = {torch.ops.aten.baddbmm_: lambda _, x, y, **__: 2 * math.prod(x) * y[-1]}
    for definition in OPDEFS.values():
        if definition._namespace not in TORCHS_OWN:
            mapping[definition._opoverload.overloadpacket] = _of_body(definition._init_fn)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def _of_body(function: Callable[..., Any]) -> Callable[..., int]:
    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:  # noqa: ARG001
        return count_flops(lambda: function(*args, **kwargs))

    formula._get_raw = True  # type: ignore[attr-defined]  # the counter passes tensors, not their shapes
    return formula
