"""One token of a recurrence with a matrix state, as in decoding, on a CPU (step.cpp)."""

import torch
from torch import Tensor

from ...recurrence.family import Recurrence, RecurrenceOutput
from . import build
from .common import contiguous, is_untracked
from .functions import call

ADD, REPLACE, MOVE = range(3)
"""Rules of step.cpp and recurrence.cpp: a token adds to the state, replaces what it reads, or writes it under another
key."""


def rule_of(x: Recurrence) -> int:
    """Return the rule of a call's family."""
    if x.b is not None:
        return MOVE
    return ADD if x.beta is None and x.a is None else REPLACE


def one_dtype(x: Recurrence) -> Recurrence:
    """Return the inputs with q, k, v, a and b in one dtype, as the sources read them: float32 if theirs differ."""
    dtype = x.q.dtype
    return x if (x.a is None or x.a.dtype == dtype) and (x.b is None or x.b.dtype == dtype) else x.widened()


def can_step(x: Recurrence) -> bool:
    """True if `step` can compute a call: one token of each row, of tensors whose operations nothing records."""
    if x.q.shape[1] != 1 or x.cu_seqlens is not None:
        return False
    # a compiler cannot follow the search for a library
    return is_untracked(*(tensor for tensor in x if isinstance(tensor, Tensor))) and build.failure("step") is None


def step(x: Recurrence) -> RecurrenceOutput:
    """Compute output and state of one token; a donated state is overwritten."""
    given = x
    if x.a is not None:  # decoding feels every call of Python
        x = one_dtype(x)
    log_decay = x.log_decay
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay.expand(x.q.shape[0], -1)
    output = x.new_output()
    state = contiguous(x.initial_state)
    final_state = None
    if x.output_final_state:
        overwrites = state is not None and (x.donated or state is not x.initial_state)
        final_state = state if overwrites else x.new_state(x.q.shape[0])
    call(
        "step",
        "recurrence_step",
        rule_of(x),
        x.q.contiguous(),
        x.k.contiguous(),
        x.v.contiguous(),
        (x.k if x.a is None else x.a).contiguous(),
        None if x.b is None else x.b.contiguous(),
        contiguous(x.beta),
        contiguous(log_decay),
        x.q.dtype == torch.bfloat16,
        log_decay is not None and log_decay.ndim == 4,
        x.scale,
        x.q.shape[0],
        x.v.shape[2],
        x.q.shape[2],
        x.q.shape[3],
        x.v.shape[3],
        state,
        final_state,
        output,
        output.dtype == torch.bfloat16,
    )
    if final_state is x.initial_state and final_state is not None and not final_state.is_inference():
        torch.autograd.graph.increment_version(final_state)
    return RecurrenceOutput(output if given is x else output.to(given.output_dtype), final_state)
