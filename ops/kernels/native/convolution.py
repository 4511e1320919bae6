"""The short convolution and its activation on a CPU, in one pass over the tokens (convolution.cpp)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...convolution.short import ConvolutionOutput, ShortConvolutionInputs
from ...runtime.custom_op import Gradients, Op
from ...runtime.kernel import Kernel, declare
from ...runtime.paradigm import Paradigm
from .common import GROUPS, contiguous, limits_of, rows, sequences
from .functions import call

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Supported dtypes, each with its name in the functions of the source."""


class Inputs(NamedTuple):
    """Inputs of the op."""

    x: Tensor
    """Inputs, [B T D]."""
    weight: Tensor
    """Filters, [D W]."""
    bias: Tensor | None
    """Bias, [D]."""
    initial_state: Tensor | None
    """Inputs before the segment, [N W-1 D]; None means zeros."""
    cu_seqlens: Tensor | None
    """Boundaries of packed documents, [N+1]; None if the batch is not packed."""
    output_final_state: bool
    """True if the final state is requested."""
    silu: bool
    """True if silu is applied to the output."""


def _allocate(x: Inputs) -> tuple[Tensor, Tensor]:
    """Allocate the output and the final state."""
    KERNEL.require(ShortConvolutionInputs(x.x, x.weight).probe())  # inside the op, which a compiler does not trace
    channels, width = x.weight.shape
    final = (rows(x.x, x.cu_seqlens), width - 1, channels) if x.output_final_state else (0,)
    return x.x.new_empty(x.x.shape), x.x.new_empty(final)


def _arguments(x: Inputs) -> tuple[Tensor, int, Tensor, Tensor | None, Tensor | None]:
    """Return the leading arguments of both functions: inputs with the stride of their tokens, filters, bias, state."""
    inputs = x.x
    batch, length, channels = inputs.shape
    row, token, channel = inputs.stride()
    if (channels > 1 and channel != 1) or (batch > 1 and row != length * token) or (length > 1 and token < channels):
        inputs = inputs.contiguous()
    stride = inputs.stride(1) if length > 1 else channels if batch == 1 else inputs.stride(0)
    initial = None if x.initial_state is None else x.initial_state.to(inputs.dtype).contiguous()
    return inputs, stride, contiguous(x.weight.T), contiguous(x.bias), initial


def _forward(x: Inputs) -> tuple[Tensor, Tensor]:
    output, final = _allocate(x)
    bounds = sequences(x.x, x.cu_seqlens)
    call(
        "convolution",
        f"forward_{NAMES[x.x.dtype]}",
        *_arguments(x),
        bounds,
        len(bounds) - 1,
        *x.weight.shape,
        x.silu,
        output,
        final if x.output_final_state else None,
    )
    return output, final


def _backward(x: Inputs, gradients: Gradients) -> dict[str, Tensor]:
    d_output, d_final = (None if d is None else d.to(x.x.dtype).contiguous() for d in gradients.outputs)
    bounds = sequences(x.x, x.cu_seqlens)
    groups = min(len(bounds) - 1, GROUPS)
    channels, width = x.weight.shape
    d_x = x.x.new_empty(x.x.shape)
    d_weight = x.x.new_empty((groups, width + 1, channels), dtype=torch.float64)
    d_initial = None if x.initial_state is None else x.x.new_empty(x.initial_state.shape)
    call(
        "convolution",
        f"backward_{NAMES[x.x.dtype]}",
        *_arguments(x),
        d_output,
        d_final if x.output_final_state else None,
        bounds,
        len(bounds) - 1,
        groups,
        channels,
        width,
        x.silu,
        d_x,
        d_weight,
        d_initial,
    )
    *d_filters, d_bias = d_weight.sum(0).unbind()
    d = {"x": d_x, "weight": torch.stack(d_filters, dim=1), "bias": d_bias}
    return d if d_initial is None else d | {"initial_state": d_initial}


CONVOLUTION = Op("short_convolution_native", Inputs, fake=_allocate, forward=_forward, backward=_backward, outputs=2)


def short_convolution_native(x: ShortConvolutionInputs) -> ConvolutionOutput:
    """Convolve each channel with its filter, with sums in float32.

    Raises:
        SeqmixError: the kernel does not support the call.
    """
    cu_seqlens = None if x.documents is None else x.documents.cu_seqlens
    inputs = Inputs(x.x, x.weight, x.bias, x.initial_state, cu_seqlens, x.output_final_state, x.silu)
    output, final = CONVOLUTION(inputs)
    return ConvolutionOutput(output, final if x.output_final_state else None)


KERNEL = declare(
    Kernel(
        op="short_convolution",
        paradigm=Paradigm.PARALLEL,
        backend="native",
        function=short_convolution_native,
        tolerances={torch.float32: 1e-6, torch.bfloat16: 4e-3},
        limits=limits_of("convolution"),
        follows_inputs=True,
    )
)
