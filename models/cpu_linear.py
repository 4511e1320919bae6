"""Linear layers on CPUs: a few rows by a native kernel, many by oneDNN where torch's default takes twice as long.

By default torch computes float32 products with MKL, which uses AVX-512 only on Intel's processors. oneDNN, which is
part of torch too, uses AVX-512 on every processor. For a few rows, as in decoding, both read the weights slowly. All
of them accumulate in float32, in different orders.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.kernels.native.linear import can_multiply, multiply_rows
from ..ops.runtime.custom_op import has_tangent

MIN_MULTIPLICATIONS = 2**22
"""Smallest number of multiplications in a product for which oneDNN is faster than torch's default."""


class Linear(nn.Linear):
    """A linear layer whose products are computed by `linear`."""

    multiplies_by_weight = True
    """Mark for mixers that fold the weight into another matrix: forward is the product of nn.Linear."""
    is_native = True
    """True to compute a few rows with the native kernel."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return linear(input, self.weight, self.bias, native=self.is_native)


def use_fast_linear(model: nn.Module) -> None:
    """Replace every plain linear layer of a model by `Linear`."""
    if USE_ONEDNN:
        _make_countable()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def _is_faster() -> bool:
    """True if oneDNN is faster than MKL here: on AMD processors with AVX-512."""
    avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if not (avx512 and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False


USE_ONEDNN = _is_faster()
"""True if oneDNN is faster than MKL on this machine."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, native: bool = True) -> Tensor:
    """Return F.linear of x [* K], weight [N K] and bias [N].

    On a CPU, a native kernel computes products of a few rows without gradients, and oneDNN large ones in float32. Set
    SEQMIX_NATIVE=0 (or `native` to False) and `torch.backends.mkldnn.enabled = False` to turn these off.
    """
    if native and can_multiply(x, weight, bias):
        return multiply_rows(x, weight, bias)
    compiling = torch.compiler.is_compiling()
    is_small = not compiling and x.numel() * weight.shape[0] < MIN_MULTIPLICATIONS
    if is_small or not (USE_ONEDNN and _is_for_onednn(x, weight, compiling)):
        return F.linear(x, weight, bias)
    product = onednn_linear(x, weight)
    return product if bias is None else product + bias


def _is_for_onednn(x: Tensor, weight: Tensor, compiling: bool) -> bool:
    """True if oneDNN supports the product: plain float32 tensors on a CPU, outside autocast and transforms."""
    if x.ndim < 2:
        return False
    # subclasses, such as distributed or quantised tensors, have their own linear function
    are_plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)
    if not (are_plain and x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"):
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    if compiling:
        # the number of tokens may be symbolic, and a graph must not depend on its size; a single token is not symbolic
        return x.shape[-2] != 1 and not has_tangent(x, weight)
    # inside transforms of torch.func, tangents and batch dimensions cannot be detected
    if torch._C._are_functorch_transforms_active() or has_tangent(x, weight):
        return False
    return bool(torch.backends.mkldnn.enabled)


@torch.library.custom_op("seqmix::linear", mutates_args=(), device_types="cpu")
def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x weight^T for x [* K] and weight [N K], by oneDNN; torch's default computes small products."""
    if x.numel() * weight.shape[0] < MIN_MULTIPLICATIONS or not torch.backends.mkldnn.enabled:
        with torch.autocast("cpu", enabled=False):
            return F.linear(x, weight).contiguous()
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()  # oneDNN does not support overlapping rows
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@onednn_linear.register_fake
def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight = ctx.needs_input_grad
    # if forward-mode differentiation starts after this layer, only the gradient has a tangent
    multiply = F.linear if has_tangent(grad, x, weight) else onednn_linear
    d_x = multiply(grad, weight.T) if wants_x else None
    if not wants_weight:
        return d_x, None
    # oneDNN copies the first operand into row-major order, so put the smaller one first
    rows = grad.flatten(0, -2).T
    columns = x.flatten(0, -2).T
    is_swapped = len(columns) < len(rows)
    return d_x, multiply(columns, rows).T if is_swapped else multiply(rows, columns)


onednn_linear.register_autograd(_gradients, setup_context=_save)


@onednn_linear.register_vmap
def _batched(info: Any, in_dims: tuple[int | None, int | None], x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    if in_dims[1] is None:
        return onednn_linear(x, weight), 0
    return torch.einsum("b...k, bnk -> b...n", x, weight.movedim(in_dims[1], 0)), 0


def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * weight[0]


@cache
def _make_countable() -> None:
    """Register `seqmix::linear` with torch's FLOP counter, only when needed: registering imports Triton."""
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.seqmix.linear)(_flops)
