"""The delta family on a CPU, token by token: ops/delta and ops/dplr, both paradigms (delta.cpp)."""

from typing import Any

import torch
from torch import Tensor

from ...delta.recurrent import delta_recurrent
from ...recurrence.family import Recurrence, RecurrenceOutput
from ...runtime.custom_op import Gradients, Op
from ...runtime.kernel import Kernel, declare
from ...runtime.paradigm import Paradigm
from . import build
from .common import contiguous, limits_of, sequences

TOKENS = 64
"""Tokens between the states that are saved for the backward pass, as in the source."""
ROWS = 16
"""Rows of a state over which a partial sum goes, in gradients that are sums over a key."""


def _allocate(x: Recurrence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the output, the final state, the states before every block of tokens, and what tokens replace."""
    KERNELS[0].require(x.probe())  # inside the op, which a compiler does not trace
    batch, length = x.q.shape[:2]
    final = (x.rows, *x.matrix) if x.output_final_state else (0,)
    entries = (batch * length // TOKENS + x.rows, *x.matrix) if x.needs_grad else (0,)
    replaced = x.v.shape if x.needs_grad else (0,)
    wide = [x.q.new_empty(shape, dtype=torch.float32) for shape in (final, entries, replaced)]
    return x.v.new_empty(x.v.shape), wide[0], wide[1], wide[2]


def _arguments(x: Recurrence, *keys: Tensor | None) -> list[Any]:
    """Return the leading arguments of both functions, from `keys` on."""
    bounds = sequences(x.q, x.cu_seqlens)
    log_decay = x.log_decay
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay.expand(*x.v.shape[:3])
    return [
        *(None if key is None else key.contiguous() for key in keys),
        contiguous(x.beta),
        contiguous(log_decay),
        x.q.dtype == torch.bfloat16,
        log_decay is not None and log_decay.ndim == 4,
        x.scale,
        bounds,
        len(bounds) - 1,
        *x.matrix,
    ]


def _forward(x: Recurrence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, final, entries, replaced = _allocate(x)
    build.run(
        "delta",
        "delta_forward",
        *_arguments(x, x.q, x.k, x.v, x.a, x.b),
        contiguous(x.initial_state),
        output,
        final if x.output_final_state else None,
        entries if x.needs_grad else None,
        replaced if x.needs_grad else None,
    )
    return output, final, entries, replaced


def _backward(x: Recurrence, gradients: Gradients) -> dict[str, Tensor]:
    (d_output, d_final), (entries, replaced) = gradients.outputs, gradients.saved
    batch, length, heads, key_width = x.k.shape
    d_output = torch.zeros_like(replaced) if d_output is None else d_output
    d_initial = None if x.initial_state is None else torch.empty(x.initial_state.shape)
    d_q, d_k, d_a, d_b = (None if key is None else key.new_empty(key.shape) for key in (x.q, x.k, x.a, x.b))
    parts = replaced.new_empty(batch, length, heads, -(-key_width // ROWS))
    d_beta = None if x.beta is None else torch.empty_like(parts)
    d_decay = None
    if x.log_decay is not None and "log_decay" in gradients.wanted:
        d_decay = replaced.new_empty(x.k.shape) if x.log_decay.ndim == 4 else torch.empty_like(parts)
    d_read = torch.empty_like(replaced)
    d_value = d_read if x.b is None else torch.empty_like(replaced)
    build.run(
        "delta",
        "delta_backward",
        *_arguments(x, x.q, x.k, x.a, x.b),
        None if x.b is None else contiguous(x.v),
        entries,
        replaced,
        contiguous(d_output),
        contiguous(d_final) if x.output_final_state else None,
        d_q,
        d_k,
        d_a,
        d_b,
        d_beta,
        d_decay,
        d_initial,
        d_read,
        d_value,
    )
    if d_decay is not None and x.log_decay is not None and x.log_decay.ndim < 4:
        d_decay = d_decay.sum(3) if x.log_decay.ndim == 3 else d_decay.sum((0, 1, 3))
    d_beta = None if d_beta is None else d_beta.sum(3)
    d = {"q": d_q, "k": d_k, "v": d_value, "a": d_a, "b": d_b, "beta": d_beta, "log_decay": d_decay}
    return {name: x for name, x in (d | {"initial_state": d_initial}).items() if x is not None}


DELTA = Op("delta_native", Recurrence, fake=_allocate, forward=_forward, backward=_backward, outputs=4, saves=2)


def delta_chunkwise_native(x: Recurrence) -> RecurrenceOutput:
    """Compute the delta family token by token, in float32.

    Raises:
        SeqmixError: the kernel does not support the call.
    """
    output, final, *_ = DELTA(x)
    return RecurrenceOutput(output, final if x.output_final_state else None)


def delta_recurrent_native(x: Recurrence) -> RecurrenceOutput:
    """Compute the same; a single token, as in decoding, by the operations of the reference.

    They cost less than a call of the op, and a compiler can fuse them.

    Raises:
        SeqmixError: the kernel does not support the call.
    """
    one_token = x.q.shape[1] == 1 and x.cu_seqlens is None
    return delta_recurrent(x) if one_token else delta_chunkwise_native(x)


TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 7e-3}

KERNELS = [
    declare(
        Kernel(
            op=op,
            paradigm=paradigm,
            backend="native",
            function=function,
            tolerances=tolerances,
            limits=limits_of("delta"),
            follows_inputs=True,
        )
    )
    for op in ("delta", "dplr")
    for paradigm, function, tolerances in (
        (Paradigm.CHUNKWISE, delta_chunkwise_native, TOLERANCES),
        (Paradigm.RECURRENT, delta_recurrent_native, TOLERANCES | {torch.float32: 1e-5}),
    )
]
