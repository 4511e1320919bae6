"""The decay family's chunkwise op and its decode step in Triton.

    S_t = exp(a_t) S_{t-1} + k_t v_t^T        o_t = scale q_t S_t        (notation of ops/decay)

for decays that all key dimensions share, log_decay None, [H] or [B T H] (of [B T H K] the step, the scan, and what
per_key_launch.py has). Tokens are cut into chunks of C. Three bodies compute everything (bodies.py):

    state_scan   walks the chunks with one tile of the state in registers, and stores what enters each chunk
                 backwards, with (q, do) for (k, v), the gradient of what leaves it
    band         factor (X S) + (mask * (X Y^T)) Z inside a chunk, for one tile of columns
                     o    X = q    Y = k    Z = v    the state that enters
                     dq   X = do   Y = v    Z = k    the same, transposed
                     dk   X = v    Y = do   Z = q    the gradient of the state that leaves, transposed; mask reversed
                     dv   X = k    Y = q    Z = do   the same; mask reversed
    step         one token: the state is read, updated in place, and read out

That a state between chunks and a band inside them is enough is Eq. 7 of the RetNet paper (arXiv 2307.08621) and its
derivative; a band for all four products is what lets dq, dk and dv be one launch, which reads the chunk once. Decays
per token and head, which the paper does not have, enter through the clocks of bodies.py, and the gradient of
a log-decay is that of ops/decay/chunkwise.py.

Accumulators, decays, and the states that walk are float32. What is stored between the bodies has the inputs' dtype,
since it is an operand of a matrix product next; in float16 a state beyond 65,504 overflows there. Products of float32
are float32, unless TF32 is asked for.

This module does not import triton: that happens where a kernel is launched.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .....registry import SeqmixError
from ....decay.api import TOLERANCES
from ....decay.recurrent import decay_recurrent
from ....recurrence.family import Recurrence, RecurrenceOutput
from ....recurrence.groups import capacity
from ....runtime.custom_op import Gradients, Op, has_tangent, needs_grad
from ....runtime.kernel import Kernel, Probe, declare
from ....runtime.paradigm import Paradigm
from ..launch import UNIT, contiguous, kernels, missing, padded, readable, strides
from .launch import MAX_KEY_WIDTH, STEP, configuration_of, too_wide
from .per_key_launch import MAX_KEY_CHUNK, launcher_of

# ---- what is taken


def limits(probe: Probe) -> list[str]:
    """Why the chunkwise kernels cannot run what they are asked about, beside the dtype."""
    return missing(probe) + too_wide(probe)


def tf32x3_limits(probe: Probe) -> list[str]:
    """The same with products of TF32."""
    reasons = limits(probe)
    if probe.log_decay == "B T H K":
        reasons.append("keys that decay by themselves take more registers for products of TF32 than there are")
    return reasons


def step_limits(probe: Probe) -> list[str]:
    """Why the step cannot run what it is asked about, beside the dtype."""
    reasons = missing(probe)
    if probe.key_width > MAX_KEY_WIDTH:
        reasons.append(f"keys are up to {MAX_KEY_WIDTH} wide, not {probe.key_width}")
    return reasons


# ---- the kernels


def decay_chunkwise_triton(x: Recurrence) -> RecurrenceOutput:
    """The chunkwise paradigm on a GPU.

    The chunks are the largest of the table that are not larger than `chunk_size`; of 64 tokens at most where every key
    dimension decays by itself.

    Raises:
        SeqmixError: `KERNEL` does not take this.
    """
    if x.log_decay is not None and x.log_decay.ndim == 4:
        x = x._replace(chunk_size=min(x.chunk_size, MAX_KEY_CHUNK))
    return padded(CHUNKWISE, x)


def decay_chunkwise_tf32x3(x: Recurrence) -> RecurrenceOutput:
    """The chunkwise paradigm on a GPU, of float32, with each product as three of TF32.

    What is left out of a product is below 2^-21 of it.

    Raises:
        SeqmixError: `TF32X3_KERNEL` does not take this.
    """
    TF32X3_KERNEL.require(x.probe())
    return decay_chunkwise_triton(x._replace(tf32x3=True))


def decay_recurrent_triton(x: Recurrence) -> RecurrenceOutput:
    """The recurrent paradigm on a GPU.

    One token without gradients is one kernel, which writes the final state over the initial one where that was donated,
    and over a copy elsewhere. More tokens, documents and gradients are the reference's.

    Raises:
        SeqmixError: `STEP_KERNEL` does not take this.
    """
    STEP_KERNEL.require(x.probe())
    tensors = (x.q, x.k, x.v, x.log_decay, x.initial_state)
    if x.q.shape[1] > 1 or x.cu_seqlens is not None or needs_grad(*tensors) or has_tangent(*tensors):
        return decay_recurrent(x)
    state = x.initial_state
    if state is None:
        state = x.new_state(x.q.shape[0]).zero_()
    elif not (x.output_final_state and x.donated and state.dtype == torch.float32 and state.is_contiguous()):
        state = state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return RecurrenceOutput(decay_step_triton(x._replace(initial_state=state)), state if x.output_final_state else None)


def decay_step_triton(x: Recurrence) -> Tensor:
    """One token for decoding, [B 1 H V]: its initial state is updated in place, and nothing waits for the device.

    Raises:
        SeqmixError: it is not one token from a float32 and contiguous state, a gradient is wanted, or `STEP_KERNEL`
            does not take this.
    """
    state = x.initial_state
    if x.q.shape[1] != 1:
        raise SeqmixError(f"a step is one token, and given are {x.q.shape[1]}")
    if state is None or state.dtype != torch.float32 or not state.is_contiguous():
        raise SeqmixError("a state that is updated in place must be float32 and contiguous")
    if needs_grad(x.q, x.k, x.v, x.log_decay, state):
        raise SeqmixError("a step in place has no gradient: decode under torch.no_grad()")
    (output,) = STEP_OP(x._replace(log_decay=None if x.log_decay is None else x.log_decay.float()))
    return output


# ---- the ops


def _allocate(x: Recurrence) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state [N H K V] and chunk entry states [chunks H K V]; the last two are empty unless saved."""
    # here, inside the ops, a compiler does not look
    KERNEL.require(x.probe())
    heads, key_width, value_width = x.matrix
    final_state = x.q.new_empty((x.rows, *x.matrix) if x.output_final_state else 0, dtype=torch.float32)
    chunk = configuration_of(x).chunk
    # saved where they are no larger than q, k and v; elsewhere the backward scans again
    if not x.needs_grad or key_width * value_width > chunk * (2 * key_width + value_width):
        return x.new_output(), final_state, x.q.new_empty(0)
    stored = capacity(x.q.shape[1], chunk, None if x.initial_state is None else x.cu_seqlens)
    entries = x.q.new_empty(x.q.shape[0] * stored, heads, key_width, value_width)
    # packed documents leave chunks over, and an output has to be defined everywhere
    return x.new_output(), final_state, entries if x.cu_seqlens is None else entries.zero_()


def _forward(x: Recurrence) -> tuple[Tensor, Tensor, Tensor]:
    output, final_state, entries = _allocate(x)
    call = launcher_of(x)
    states = entries if entries.numel() else call.new_states(call.entries)
    final = final_state if x.output_final_state else None
    call.scan(call.keys, call.v, states, {"initial": contiguous(x.initial_state), "final": final})
    call.forward_band(states, output)
    return output, final_state, entries


def _backward(x: Recurrence, gradients: Gradients) -> dict[str, Tensor]:
    (d_output, d_final_state), (states,) = gradients.outputs, gradients.saved
    needs_log_decay = x.log_decay is not None and "log_decay" in gradients.wanted
    d_final = None if d_final_state is None or not d_final_state.numel() else d_final_state.contiguous()
    call = launcher_of(x, needs_log_decay, d_final=d_final is not None)
    given = {"v": x.v, "initial_state": x.initial_state}
    given["log_decay"] = x.log_decay if needs_log_decay or call.totals is not None else None
    out = {name: tensor.new_empty(tensor.shape) for name, tensor in given.items() if tensor is not None}
    out |= {name: x.q.new_empty(*x.v.shape[:3], call.key_width) for name in "qk"}
    # an operand of products as narrow as the others: the gradient of a wide output is rounded here, once
    do = readable(torch.zeros_like(x.v) if d_output is None else d_output.to(x.v.dtype), call.chunk)
    if not states.numel():
        states = call.new_states(call.entries)
        call.scan(call.keys, call.v, states, {"initial": contiguous(x.initial_state)})
    products, d_states = call.new_products(call.scan_tiles) if needs_log_decay else None, call.new_states(call.exits)
    ends = {"initial": d_final, "final": out.get("initial_state")}
    if products is not None:
        ends |= {"entries": states, "products": products}
    call.scan(call.queries, do, d_states, ends, reverse=True)
    call.gradients(do, out, products, states=states, d_states=d_states)
    if call.shared > 1:
        out |= {name: out[name].unflatten(2, (-1, call.shared)).sum(3) for name in "qk"}
    return out


def _allocate_step(x: Recurrence) -> tuple[Tensor]:
    STEP_KERNEL.require(x.probe())
    return (x.new_output(),)


def _step(x: Recurrence) -> tuple[Tensor]:
    """The output of one token; the initial state is updated."""
    (output,) = _allocate_step(x)
    batch, (heads, key_width, value_width) = x.q.shape[0], x.matrix
    tile, log_decay = STEP.tile[1], x.log_decay
    q, k, v = (readable(tensor, 1) for tensor in (x.q, x.k, x.v))
    row, head, key = 0, 0, 0
    if log_decay is not None and log_decay.ndim == 1:
        head = log_decay.stride(0)
    elif log_decay is not None:
        row, _, head, *keys = log_decay.stride()
        key = sum(keys)
    tensors = {"q": q, "k": k, "v": v}
    decays = {"log_decay": log_decay, "decay_row": row, "decay_head": head, "decay_key": key}
    sizes = {
        "heads": heads,
        "shared": x.shared,
        "K": key_width,
        "V": value_width,
        "WIDTH": max(UNIT, 1 << (key_width - 1).bit_length()),
    }
    kernels("decay").step[(-(-value_width // tile) * batch * heads,)](
        state=x.initial_state,
        out=output,
        scale=x.scale,
        TILE_V=tile,
        **tensors,
        **strides("row", "head", **tensors),
        **decays,
        **sizes,
        **STEP.options,
    )
    return (output,)


CHUNKWISE = Op("decay_chunkwise_triton", Recurrence, fake=_allocate, forward=_forward, backward=_backward, saves=1)
STEP_OP = Op(
    "decay_step_triton",
    Recurrence,
    fake=_allocate_step,
    forward=_step,
    backward=None,
    outputs=1,
    mutates=("initial_state",),
)

KERNEL = declare(
    Kernel(
        op="decay",
        paradigm=Paradigm.CHUNKWISE,
        backend="triton",
        function=decay_chunkwise_triton,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.3e-3},
        limits=limits,
    )
)

TF32X3_KERNEL = declare(
    replace(
        KERNEL,
        backend="triton_tf32x3",
        function=decay_chunkwise_tf32x3,
        tolerances={torch.float32: 1e-5},
        limits=tf32x3_limits,
    )
)

STEP_KERNEL = declare(
    Kernel(
        op="decay",
        paradigm=Paradigm.RECURRENT,
        backend="triton",
        function=decay_recurrent_triton,
        tolerances={dtype: TOLERANCES[dtype] for dtype in KERNEL.tolerances},
        limits=step_limits,
    )
)
# one token has no products of matrices
declare(replace(STEP_KERNEL, backend="triton_tf32x3", tolerances={torch.float32: TOLERANCES[torch.float32]}))
