"""The selective scan on a CPU: h_t = exp(step_t rate) h_{t-1} + k_t x_t^T, o_t = q_t h_t (selective.cpp)."""

import torch
from torch import Tensor

from ...runtime.custom_op import Gradients, Op
from ...runtime.kernel import Kernel, declare
from ...runtime.paradigm import Paradigm
from ...scan.selective import Selective
from .common import BLOCK, GROUPS, contiguous, limits_of, rows, saved_states, sequences
from .functions import call


def _allocate(x: Selective) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the output, the final state, and the states before every chunk."""
    KERNELS[0].require(x.probe())  # inside the op, which a compiler does not trace
    final_shape = (rows(x.x, x.cu_seqlens), *x.rate.shape) if x.output_final_state else (0,)
    output, final = (x.x.new_empty(shape, dtype=torch.float32) for shape in (x.x.shape, final_shape))
    entries = saved_states(x.x, x.cu_seqlens, tuple(x.rate.shape)) if x.needs_grad else final.new_empty(0)
    return output, final, entries


def _forward(x: Selective) -> tuple[Tensor, Tensor, Tensor]:
    output, final, entries = _allocate(x)
    bounds = sequences(x.x, x.cu_seqlens)
    keys, channels = x.rate.shape
    call(
        "selective",
        "selective_forward",
        *map(contiguous, (x.x, x.step, x.rate, x.k, x.q, x.initial_state)),
        bounds,
        len(bounds) - 1,
        channels,
        keys,
        output,
        final if x.output_final_state else None,
        entries if x.needs_grad else None,
    )
    return output, final, entries


def _backward(x: Selective, gradients: Gradients) -> dict[str, Tensor]:
    (d_output, d_final), (entries,) = gradients.outputs, gradients.saved
    bounds = sequences(x.x, x.cu_seqlens)
    keys, channels = x.rate.shape
    groups = min(len(bounds) - 1, GROUPS)
    blocks = -(-channels // BLOCK)
    d_x, d_step = (x.x.new_empty(x.x.shape, dtype=torch.float32) for _ in range(2))
    d_k, d_q = (x.x.new_empty((blocks, *x.k.shape), dtype=torch.float32) for _ in range(2))
    d_rate = x.x.new_empty((groups, keys, channels), dtype=torch.float64)
    d_initial = None if x.initial_state is None else x.x.new_empty(x.initial_state.shape, dtype=torch.float32)
    call(
        "selective",
        "selective_backward",
        *map(contiguous, (x.x, x.step, x.rate, x.k, x.q)),
        entries,
        contiguous(d_output),
        contiguous(d_final if x.output_final_state else None),
        bounds,
        len(bounds) - 1,
        groups,
        channels,
        keys,
        d_x,
        d_step,
        d_rate,
        d_k,
        d_q,
        d_initial,
    )
    d = {"x": d_x, "step": d_step, "rate": d_rate.sum(0), "k": d_k[0], "q": d_q[0]}
    return d if d_initial is None else d | {"initial_state": d_initial}


SELECTIVE = Op("selective_scan_native", Selective, fake=_allocate, forward=_forward, backward=_backward, saves=1)


def selective_scan_native(x: Selective) -> tuple[Tensor, Tensor | None]:
    """Compute the selective scan token by token, in float32.

    Raises:
        SeqmixError: the kernel does not support the call.
    """
    output, final, _ = SELECTIVE(x)
    return output.to(x.x.dtype), final if x.output_final_state else None


KERNELS = [
    declare(
        Kernel(
            op="selective_scan",
            paradigm=paradigm,
            backend="native",
            function=selective_scan_native,
            tolerances={torch.float32: 1e-5, torch.bfloat16: 4e-3},
            limits=limits_of("selective"),
            follows_inputs=True,
        )
    )
    for paradigm in (Paradigm.RECURRENT, Paradigm.CHUNKWISE)
]
