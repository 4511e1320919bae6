"""The cell of M2RNN on a CPU (m2rnn.cpp)."""

import torch
from torch import Tensor

from ...cell.m2rnn import M2RNN
from ...runtime.custom_op import Gradients, Op
from ...runtime.kernel import Kernel, declare
from ...runtime.paradigm import Paradigm
from .common import contiguous, limits_of, saved_states, sequences
from .functions import call


def _allocate(x: M2RNN) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the output, the final state, and the states before every chunk."""
    KERNELS[0].require(x.probe())  # inside the op, which a compiler does not trace
    final_shape = x.state_shape if x.output_final_state else (0,)
    output, final = (x.v.new_empty(shape, dtype=torch.float32) for shape in (x.v.shape, final_shape))
    entries = saved_states(x.v, x.cu_seqlens, x.state_shape[1:]) if x.needs_grad else final.new_empty(0)
    return output, final, entries


def _forward(x: M2RNN) -> tuple[Tensor, Tensor, Tensor]:
    output, final, entries = _allocate(x)
    call(
        "m2rnn",
        "m2rnn_forward",
        *map(contiguous, (x.q, x.k, x.v, x.log_decay, x.weight, x.initial_state)),
        sequences(x.v, x.cu_seqlens),
        *x.state_shape,
        output,
        final if x.output_final_state else None,
        entries if x.needs_grad else None,
    )
    return output, final, entries


def _backward(x: M2RNN, gradients: Gradients) -> dict[str, Tensor]:
    (d_output, d_final), (entries,) = gradients.outputs, gradients.saved
    names = ("q", "k", "v", "log_decay")
    d = {name: torch.empty(getattr(x, name).shape, dtype=torch.float32) for name in names}
    d_weight = torch.empty((x.state_shape[0], *x.weight.shape), dtype=torch.float64)
    d_initial = None if x.initial_state is None else torch.empty(x.state_shape, dtype=torch.float32)
    call(
        "m2rnn",
        "m2rnn_backward",
        *map(contiguous, (x.q, x.k, x.v, x.log_decay, x.weight)),
        entries,
        contiguous(d_output),
        contiguous(d_final if x.output_final_state else None),
        sequences(x.v, x.cu_seqlens),
        *x.state_shape,
        *d.values(),
        d_weight,
        d_initial,
    )
    d["weight"] = d_weight.sum(0)
    return d if d_initial is None else d | {"initial_state": d_initial}


OP = Op("m2rnn_native", M2RNN, fake=_allocate, forward=_forward, backward=_backward, saves=1)


def m2rnn_native(x: M2RNN) -> tuple[Tensor, Tensor | None]:
    """Compute the cell in float32.

    Raises:
        SeqmixError: the kernel does not support the call.
    """
    output, final, _ = OP(x)
    return output.to(x.v.dtype), final if x.output_final_state else None


KERNELS = [
    declare(
        Kernel(
            op="m2rnn",
            paradigm=Paradigm.RECURRENT,
            backend="native",
            function=m2rnn_native,
            tolerances={torch.float32: 1e-5, torch.bfloat16: 1.6e-2},
            limits=limits_of("m2rnn"),
            follows_inputs=True,
        )
    )
]
