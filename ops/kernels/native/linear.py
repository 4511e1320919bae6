"""Products of a few rows with a matrix of weights on a CPU, as in decoding (linear.cpp)."""

import torch
from torch import Tensor

from ...runtime.custom_op import register
from . import build
from .common import is_untracked
from .functions import call

MIN_ROWS = 2
"""Minimum number of rows: for one, torch reads the weights about as fast, and a call of it costs less."""
MAX_ROWS = 8
"""Maximum number of rows; for more, torch computes products of matrices."""
MIN_WEIGHTS = 2**16
"""Minimum number of weights; with fewer, the call itself takes longer than the product."""
FUNCTIONS = {torch.float32: "linear_float32", torch.bfloat16: "linear_bfloat16"}


def can_multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """True if `multiply_rows` supports x [* K], weight [N K] and bias [N], and is faster than torch."""
    if torch._C._get_tracing_state() is not None:  # sizes are tensors then
        return False
    keys = x.shape[-1]
    if weight.numel() < MIN_WEIGHTS or not MIN_ROWS * keys <= x.numel() <= MAX_ROWS * keys:
        return False
    if x.device.type != "cpu" or x.dtype not in FUNCTIONS or torch.is_autocast_enabled("cpu"):
        return False
    if not weight.is_contiguous() or any(y is not None and y.dtype != x.dtype for y in (weight, bias)):
        return False
    if keys != weight.shape[1] or build.is_off():
        return False
    # a compiler cannot follow the search for a library
    return is_untracked(x, weight, bias) and build.failure("linear") is None


def multiply_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weight^T + bias, with sums in float32."""
    x = x.contiguous()
    keys, width = x.shape[-1], len(weight)
    y = x.new_empty((*x.shape[:-1], width))
    bias = None if bias is None else bias.contiguous()
    call("linear", FUNCTIONS[x.dtype], x, weight, bias, y, x.numel() // keys, keys, width)
    return y


def may_multiply(rows: int, weight: Tensor) -> bool:
    """True if `multiply_rows_compiled` supports `rows` rows and a weight matrix, which may be a compiler's example."""
    if not MIN_ROWS <= rows <= MAX_ROWS or weight.numel() < MIN_WEIGHTS or weight.dtype not in FUNCTIONS:
        return False
    if weight.device.type != "cpu" or not weight.is_contiguous() or build.is_off():
        return False
    return build.failure("linear") is None


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    del bias
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


multiply_rows_compiled = register(
    "multiply_rows",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    multiply_rows,
    _fake,
)
"""`multiply_rows` as an operator of a compiled graph without gradients."""
