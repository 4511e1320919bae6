"""Batched products of bfloat16 on processors that multiply it faster than float32."""

import torch
from torch import Tensor

from .family import Recurrence

HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
"""Whether the CPU multiplies bfloat16 (AVX-512-BF16); emulated, it is slower than float32."""
LEAST = 2**17
"""Multiplications of a chunk's tokens with its state from which rounding the operands pays."""


def product_dtype(x: Recurrence) -> torch.dtype:
    """The dtype in which a call's tokens are multiplied: that of its inputs where that is faster, else that of states.

    Products of few tokens are not: calling them costs more than computing them. A gradient of a wide output is not
    rounded for them.
    """
    _, keys, values = x.matrix
    large = min(x.chunk_size, x.q.shape[1]) * keys * values >= LEAST
    able = HAS_BFLOAT16 and torch.backends.mkldnn.enabled and x.q.device.type == "cpu"
    return x.q.dtype if able and large and x.output_dtype == torch.bfloat16 else x.wide


def product(x: Tensor, y: Tensor) -> Tensor:
    """x y of [G m n] and [G n l]; float32 of operands that one of them being bfloat16 rounds to it both."""
    if torch.bfloat16 not in (x.dtype, y.dtype):
        return torch.bmm(x, y)
    return torch.bmm(x.to(torch.bfloat16), y.to(torch.bfloat16)).to(torch.float32)


def add_product(out: Tensor, x: Tensor, y: Tensor) -> None:
    """Add a product to `out`, in place."""
    if x.dtype == out.dtype:
        out.baddbmm_(x, y)
    else:
        out += product(x, y)
