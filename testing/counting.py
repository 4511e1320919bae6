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
    with FlopCounterMode(display=False, custom_mapping=_mapping()) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def _mapping() -> dict[Any, Any]:
    # torch counts baddbmm, but not in place
    mapping: dict[Any, Any] = {torch.ops.aten.baddbmm_: _baddbmm_flops}
    for definition in OPDEFS.values():
        if definition._namespace not in TORCHS_OWN:
            mapping[definition._opoverload.overloadpacket] = _of_body(definition._init_fn)
    return mapping


def _baddbmm_flops(_: Any, x_shape: list[int], y_shape: list[int], **__: Any) -> int:
    return 2 * math.prod(x_shape) * y_shape[-1]


def _of_body(function: Callable[..., Any]) -> Callable[..., int]:
    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:  # noqa: ARG001
        return count_flops(lambda: function(*args, **kwargs))

    formula._get_raw = True  # type: ignore[attr-defined]  # the counter passes tensors, not their shapes
    return formula
