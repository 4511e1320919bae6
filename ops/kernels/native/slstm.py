"""The cell of sLSTM on a CPU (slstm.cpp)."""

import torch
from torch import Tensor

from ...cell.slstm import SLSTM, allocate, named_gradients
from ...runtime.custom_op import Gradients, Op
from ...runtime.kernel import Kernel, declare
from ...runtime.paradigm import Paradigm
from .common import contiguous, limits_of, sequences
from .functions import call


def _allocate(x: SLSTM) -> tuple[Tensor, ...]:
    KERNELS[0].require(x.probe())  # inside the op, which a compiler does not trace
    return allocate(x)


def _forward(x: SLSTM) -> tuple[Tensor, ...]:
    output, memory, weight, logits, means, shares = allocated = _allocate(x)
    bounds = sequences(x.gates, x.cu_seqlens)
    saved = (logits, means, shares) if x.needs_grad else (None,) * 3
    final = (memory, weight) if x.output_final_state else (None, None)
    call(
        "slstm",
        "slstm_forward",
        *map(contiguous, (x.gates, x.recurrent, x.memory)),
        None if x.weight is None else x.weight.double().contiguous(),
        bounds,
        *x.shape,
        x.exponential,
        output,
        *final,
        *saved,
    )
    return allocated


def _backward(x: SLSTM, gradients: Gradients) -> dict[str, Tensor]:
    logits, means, shares = gradients.saved
    rows, heads, width = x.shape
    d_gates = torch.empty_like(logits)
    d_memory = logits.new_empty(rows, heads, 2, width)
    d_weight = logits.new_empty(rows, heads, width)
    call(
        "slstm",
        "slstm_backward",
        logits,
        means,
        shares,
        *map(contiguous, (x.recurrent, x.memory, *gradients.outputs)),
        sequences(x.gates, x.cu_seqlens),
        rows,
        heads,
        width,
        x.exponential,
        d_gates,
        d_memory,
        d_weight,
    )
    return named_gradients(x, gradients, d_gates, d_memory, d_weight)


OP = Op("slstm_native", SLSTM, fake=_allocate, forward=_forward, backward=_backward, outputs=6, saves=3)


def slstm_native(x: SLSTM) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Compute the cell in float32.

    Raises:
        SeqmixError: the kernel does not support the call.
    """
    output, memory, weight, *_ = OP(x)
    return output.to(x.gates.dtype), (memory, weight) if x.output_final_state else None


KERNELS = [
    declare(
        Kernel(
            op="slstm",
            paradigm=Paradigm.RECURRENT,
            backend="native",
            function=slstm_native,
            tolerances={torch.float32: 1e-5, torch.bfloat16: 1.6e-2},
            limits=limits_of("slstm"),
            follows_inputs=True,
        )
    )
]
