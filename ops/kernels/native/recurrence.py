"""Recurrences with a matrix state on a CPU, token by token: decay, delta and dplr, both paradigms (recurrence.cpp)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...decay.recurrent import decay_recurrent
from ...delta.recurrent import delta_recurrent
from ...recurrence.family import Recurrence, RecurrenceOutput, Run
from ...runtime.custom_op import Gradients, Op
from ...runtime.kernel import Kernel, declare
from ...runtime.paradigm import Paradigm
from .common import contiguous, limits_of, sequences
from .functions import call
from .step import ADD, MOVE, REPLACE, can_step, one_dtype, rule_of, step

TOKENS = 64
"""Tokens between the states that are saved for the backward pass; the constant has the same value in the source."""
ROWS = 16
"""Number of key dimensions in each partial sum of a gradient that is a sum over key dimensions; as in the source."""


def _allocate(x: Recurrence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the output, the final state, the states before all blocks of tokens, and the values that tokens read.

    The last has e_t for the rule REPLACE, r_t for MOVE, see the source. What is not needed is empty.
    """
    op = "decay" if rule_of(x) == ADD else "delta" if x.a is None else "dplr"
    KERNELS[op].require(x.probe())  # inside the op, which a compiler does not trace
    batch, length = x.q.shape[:2]
    final = (x.rows, *x.state_shape) if x.output_final_state else (0,)
    saves = x.needs_grad and not x.reads_values
    entries = (batch * length // TOKENS + x.rows, *x.state_shape) if saves else (0,)
    reads = x.v.shape if x.needs_grad and rule_of(x) != ADD else (0,)
    wide = [x.q.new_empty(shape, dtype=torch.float32) for shape in (final, entries, reads)]
    return x.new_output(), wide[0], wide[1], wide[2]


def _arguments(x: Recurrence, *keys: Tensor | None) -> list[Any]:
    """Return the leading arguments of both functions; `keys` are the tensors between the rule and beta."""
    bounds = sequences(x.q, x.cu_seqlens)
    log_decay = x.log_decay
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay.expand(*x.v.shape[:3])
    return [
        rule_of(x),
        *(None if key is None else key.contiguous() for key in keys),
        contiguous(x.beta),
        contiguous(log_decay),
        x.q.dtype == torch.bfloat16,
        log_decay is not None and log_decay.ndim == 4,
        x.scale,
        bounds,
        len(bounds) - 1,
        x.q.shape[2],
        *x.state_shape,
    ]


def _forward(x: Recurrence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, final, entries, reads = _allocate(x)
    if x.reads_values:
        _read_values(x, output, final)
        return output, final, entries, reads
    call(
        "recurrence",
        "recurrence_forward",
        *_arguments(x, x.q, x.k, x.v, x.k if x.a is None else x.a, x.b),
        contiguous(x.initial_state),
        output,
        x.wide_output,
        final if x.output_final_state else None,
        entries if x.needs_grad else None,
        reads if reads.numel() else None,
    )
    return output, final, entries, reads


def _read_values(x: Recurrence, output: Tensor, final: Tensor) -> None:
    """Compute a call whose queries read the state along its values, and write its results."""
    bounds = sequences(x.q, x.cu_seqlens)
    log_decay = x.log_decay
    assert log_decay is not None
    call(
        "recurrence",
        "recurrence_reading_values",
        x.k.contiguous(),
        contiguous(log_decay),
        x.k.dtype == torch.bfloat16,
        log_decay.ndim == 4,
        x.scale,
        bounds,
        len(bounds) - 1,
        *x.state_shape,
        contiguous(x.q),
        contiguous(x.v),
        contiguous(x.initial_state),
        output,
        final if x.output_final_state else None,
    )


def _backward(x: Recurrence, gradients: Gradients) -> dict[str, Tensor]:
    if not x.reads_values:
        return _gradients(x, gradients)
    # of the loss sum_t d_output_t S_t q_t: a call with queries d_output, whose output has the gradient q
    d_output, d_final = gradients.outputs
    queries = torch.zeros_like(x.k) if d_output is None else d_output.to(x.k.dtype)
    swapped = x._replace(q=queries, reads_values=False, needs_grad=True)
    d_q, _, *saved = _forward(swapped)
    return _gradients(swapped, Gradients((x.q, d_final), tuple(saved), gradients.wanted)) | {"q": d_q}


def _gradients(x: Recurrence, gradients: Gradients) -> dict[str, Tensor]:
    (d_output, d_final), (entries, reads) = gradients.outputs, gradients.saved
    rule = rule_of(x)
    per_head = (*x.v.shape[:3], x.k.shape[3])
    parts = (*x.v.shape[:3], -(-x.k.shape[3] // ROWS))
    d_output = entries.new_zeros(x.v.shape) if d_output is None else d_output
    d_initial = None if x.initial_state is None else entries.new_empty(x.initial_state.shape)
    d_q, d_k = (x.q.new_empty(per_head, dtype=x.q.dtype if x.heads_per_key == 1 else torch.float32) for _ in range(2))
    d_a, d_b = (None if key is None else key.new_empty(key.shape) for key in (x.a, x.b))
    d_beta = None if x.beta is None else entries.new_empty(parts)
    d_decay = None
    if x.log_decay is not None and "log_decay" in gradients.wanted:
        d_decay = entries.new_empty(per_head if x.log_decay.ndim == 4 else parts)
    d_value = entries.new_empty(x.v.shape)
    d_read = d_value if rule == REPLACE else entries.new_empty(x.v.shape) if rule == MOVE else None
    call(
        "recurrence",
        "recurrence_backward",
        *_arguments(x, x.q, x.k, x.k if x.a is None else x.a, x.b),
        reads if rule == REPLACE else contiguous(x.v),
        entries,
        None if rule == ADD else reads,
        contiguous(d_output),
        contiguous(d_final) if x.output_final_state else None,
        d_q,
        d_k,
        d_a,
        d_b,
        d_beta,
        d_decay,
        d_initial,
        d_value,
        d_read,
    )
    if x.heads_per_key > 1:
        d_q, d_k = (d.unflatten(2, (-1, x.heads_per_key)).sum(3) for d in (d_q, d_k))
    if d_decay is not None and x.log_decay is not None and x.log_decay.ndim < 4:
        d_decay = d_decay.sum(3) if x.log_decay.ndim == 3 else d_decay.sum((0, 1, 3))
    d_beta = None if d_beta is None else d_beta.sum(3)
    d = {"q": d_q, "k": d_k, "v": d_value, "a": d_a, "b": d_b, "beta": d_beta, "log_decay": d_decay}
    return {name: x for name, x in (d | {"initial_state": d_initial}).items() if x is not None}


RECURRENCE = Op(
    "recurrence_native", Recurrence, fake=_allocate, forward=_forward, backward=_backward, outputs=4, saves=2
)


def recurrence_chunkwise_native(x: Recurrence) -> RecurrenceOutput:
    """Compute a recurrence token by token, in float32; blocks of tokens replace chunks.

    Raises:
        SeqmixError: the kernel does not support the call.
    """
    output, final, *_ = RECURRENCE(one_dtype(x))
    return RecurrenceOutput(output.to(x.output_dtype), final if x.output_final_state else None)


def _recurrent(reference: Run, x: Recurrence) -> RecurrenceOutput:
    """Compute the recurrent paradigm as `recurrence_chunkwise_native` does, except for a single token, as in decoding.

    step.cpp computes that token; where a compiler or autograd follows, the plain operations of the reference do.

    Raises:
        SeqmixError: the kernel does not support the call.
    """
    one_token = x.q.shape[1] == 1 and x.cu_seqlens is None
    supported = x.q.device.type == "cpu" and x.q.dtype in TOLERANCES
    if not (one_token and supported):
        return recurrence_chunkwise_native(x)
    return step(x) if can_step(x) else reference(x)


def decay_recurrent_native(x: Recurrence) -> RecurrenceOutput:
    """Compute the decay family as `recurrence_chunkwise_native`, except for a single token."""
    return _recurrent(decay_recurrent, x)


def delta_recurrent_native(x: Recurrence) -> RecurrenceOutput:
    """Compute the delta family as `recurrence_chunkwise_native`, except for a single token."""
    return _recurrent(delta_recurrent, x)


TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 7e-3}


def _declare(op: str, recurrent: Run) -> Kernel:
    """Declare the kernels of an op's paradigms, and return that of the chunkwise paradigm."""
    chunkwise = Kernel(
        op=op,
        paradigm=Paradigm.CHUNKWISE,
        backend="native",
        function=recurrence_chunkwise_native,
        tolerances=TOLERANCES,
        limits=limits_of("recurrence"),
        follows_inputs=True,
        reads_values=op == "decay",
    )
    # a single token has the error of the reference
    tolerances = TOLERANCES | {torch.float32: 1e-5}
    recurrent_fields = {"paradigm": Paradigm.RECURRENT, "function": recurrent, "tolerances": tolerances}
    declare(replace(chunkwise, **recurrent_fields, reads_values=False))
    return declare(chunkwise)


KERNELS = {
    "decay": _declare("decay", decay_recurrent_native),
    "delta": _declare("delta", delta_recurrent_native),
    "dplr": _declare("dplr", delta_recurrent_native),
}
