"""Batched matrix products, in bfloat16 on CPUs that multiply it faster than float32."""

import torch
from torch import Tensor

from .family import Recurrence

HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
"""True if the CPU multiplies bfloat16 in hardware (AVX-512-BF16); emulation is slower than float32."""
MIN_MULTIPLICATIONS = 2**17
"""Multiplications in the product of a chunk with its state from which rounding its operands to bfloat16 saves time."""


def product_dtype(x: Recurrence) -> torch.dtype:
    """Return the dtype for matrix products of tokens: the dtype of the inputs where that is faster, else of states.

    It is not faster for small products, which cost more to launch than to compute. Calls with a wide output use the
    dtype of states, so that the gradient of the output is not rounded.
    """
    _, key_width, value_width = x.state_shape
    large = min(x.chunk_size, x.q.shape[1]) * key_width * value_width >= MIN_MULTIPLICATIONS
    supported = HAS_BFLOAT16 and torch.backends.mkldnn.enabled and x.q.device.type == "cpu"
    return x.q.dtype if supported and large and x.output_dtype == torch.bfloat16 else x.wide_dtype


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return the batched product x y of [G m n] and [G n l].

    If either operand is bfloat16, both are cast to bfloat16; the result is then float32.
    """
    if torch.bfloat16 not in (x.dtype, y.dtype):
        return torch.bmm(x, y)
    return torch.bmm(x.to(torch.bfloat16), y.to(torch.bfloat16)).to(torch.float32)


def add_product(out: Tensor, x: Tensor, y: Tensor) -> None:
    """Add the batched product x y to `out`, in place."""
    if x.dtype == out.dtype:
        out.baddbmm_(x, y)
    else:
        out += product(x, y)
