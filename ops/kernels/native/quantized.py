"""Products of rows with a matrix of weights of 8 or 4 bits on a CPU, as in decoding (quantized.cpp)."""

import torch
from torch import Tensor

from . import build
from .common import is_untracked
from .functions import call

GROUP = 32
"""Number of inputs that share a scale and an offset, with 4 bits; rows of 8-bit codes are padded to a multiple."""
MAX_ROWS = 256
"""Maximum number of rows; for more, it takes less time to decode the matrix and to multiply floats."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of rows. Every row is rounded to integers of 16 bits, relative to its largest number; sums of products are
integers, which are scaled and added up in float32."""


def can_multiply(x: Tensor, bias: Tensor | None) -> bool:
    """True if the functions of this file support x [* K] and a bias, nothing records the call, and torch is slower."""
    return is_untracked(x, bias) and is_supported(x)


def is_supported(x: Tensor) -> bool:
    """True if the functions of this file support x [* K], and torch is slower."""
    if x.device.type != "cpu" or x.dtype not in DTYPES or not 1 <= x.numel() <= MAX_ROWS * x.shape[-1]:
        return False
    return not (build.is_off() or torch.is_autocast_enabled("cpu")) and build.failure("quantized") is None


def multiply_int8(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weight^T + bias, where weight = scales * codes, for contiguous codes [N K+padding] and scales [N]."""
    return _multiply("linear_int8", x, (codes, scales), bias)


def multiply_int4(x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weight^T + bias, where weight = scales * codes + offsets.

    A byte of codes [N groups 16] has the codes of inputs i (low bits) and i + 16 (high bits) of its group of 32; scales
    and offsets are bfloat16 [N groups]. All are contiguous.
    """
    return _multiply("linear_int4", x, (codes, scales, offsets), bias)


def _multiply(function: str, x: Tensor, matrix: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    dtype = x.dtype
    if dtype is not torch.float32:
        x = x.to(torch.float32)
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    x = x.contiguous()
    keys, width = x.shape[-1], matrix[0].shape[0]
    y = x.new_empty((*x.shape[:-1], width))
    call("quantized", function, x, *matrix, bias, y, x.numel() // keys, keys, width)
    return y if dtype is torch.float32 else y.to(dtype)
