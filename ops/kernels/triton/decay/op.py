"""The decay family's chunkwise op and its decoding step in Triton.

    S_t = exp(a_t) S_{t-1} + k_t v_t^T        o_t = scale q_t S_t        (notation of ops/decay)

Decays are shared by all key dimensions: log_decay is None, [H] or [B T H]. For [B T H K] the step and the scan are the
same, and per_key_launch.py has the rest. Tokens are divided into chunks of C. Three jitted functions (bodies.py) do
all of the work:

    state_scan   goes through the chunks with one tile of the state in registers, and stores each chunk's entry state S;
                 backwards, with (q, do) for (k, v), it stores the gradient dS' of each chunk's exit state
    band         factor (X S) + (mask * (X Y^T)) Z inside a chunk, for one tile of columns
                     o    X = q    Y = k    Z = v    S
                     dq   X = do   Y = v    Z = k    S, transposed
                     dk   X = v    Y = do   Z = q    dS', transposed; mask reversed
                     dv   X = k    Y = q    Z = do   dS'; mask reversed
    step         one token: updates the state in place and computes the output

This is Eq. 7 of the RetNet paper (arXiv 2307.08621) and its derivative. Because dq, dk and dv have one form, a single
launch computes all three and reads a chunk from memory once. Decays per token and head, which the paper does not have,
enter through the clocks of tiles.py; the gradient of a log-decay is that of ops/decay/chunkwise.py.

Accumulators, decays, and the states carried by a scan are float32. Tensors stored between the functions have the
inputs' dtype, because they are operands of matrix products; in float16 a state beyond 65,504 overflows there. Products
of float32 are float32, unless TF32 is requested.

This module does not import triton; that happens when a kernel is launched.
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
from ..launch import UNIT, addressable, contiguous, kernels, missing_requirements, run_padded, strides
from .launch import MAX_KEY_WIDTH, STEP, configuration_of, width_limits
from .per_key_launch import MAX_KEY_CHUNK, launcher_of

# ---- limits


def limits(probe: Probe) -> list[str]:
    """Return the reasons, apart from the dtype, why the chunkwise kernel cannot run a call; empty if it can."""
    return missing_requirements(probe) + width_limits(probe)


def tf32x3_limits(probe: Probe) -> list[str]:
    """Return the reasons, apart from the dtype, why the chunkwise kernel cannot run a call with TF32 products."""
    reasons = limits(probe)
    if probe.log_decay == "B T H K":
        reasons.append("decays per key dimension take more registers with TF32 products than a GPU has")
    return reasons


def step_limits(probe: Probe) -> list[str]:
    """Return the reasons, apart from the dtype, why the decoding step cannot run a call; empty if it can."""
    reasons = missing_requirements(probe)
    if probe.key_width > MAX_KEY_WIDTH:
        reasons.append(f"keys must be at most {MAX_KEY_WIDTH} wide, got {probe.key_width}")
    return reasons


# ---- the kernels


def decay_chunkwise_triton(x: Recurrence) -> RecurrenceOutput:
    """Compute the chunkwise paradigm on a GPU.

    On Hopper GPUs, chunks have the largest supported length up to `chunk_size`, and at most 64 tokens with decays per
    key dimension; on other GPUs, the smallest supported length.

    Raises:
        SeqmixError: `KERNEL` does not support the call.
    """
    if x.log_decay is not None and x.log_decay.ndim == 4:
        x = x._replace(chunk_size=min(x.chunk_size, MAX_KEY_CHUNK))
    return run_padded(CHUNKWISE, x)


def decay_chunkwise_tf32x3(x: Recurrence) -> RecurrenceOutput:
    """Compute the chunkwise paradigm on a GPU in float32, with each product computed as three TF32 products.

    The relative error of a product is below 2^-21.

    Raises:
        SeqmixError: `TF32X3_KERNEL` does not support the call.
    """
    TF32X3_KERNEL.require(x.probe())
    return decay_chunkwise_triton(x._replace(tf32x3=True))


def decay_recurrent_triton(x: Recurrence) -> RecurrenceOutput:
    """Compute the recurrent paradigm on a GPU.

    One token without gradients is one kernel launch. It writes the final state over the initial one if that is donated,
    else over a copy. Several tokens, packed documents and gradients are computed by the reference.

    Raises:
        SeqmixError: `STEP_KERNEL` does not support the call.
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
    """Compute the output of one decoded token, [B 1 H V], and update its initial state in place.

    Nothing waits for the device.

    Raises:
        SeqmixError: the call is not one token with a contiguous float32 state, a gradient is required, or `STEP_KERNEL`
            does not support the call.
    """
    state = x.initial_state
    if x.q.shape[1] != 1:
        raise SeqmixError(f"a decoding step expects one token, got {x.q.shape[1]}")
    if state is None or state.dtype != torch.float32 or not state.is_contiguous():
        described = "none" if state is None else f"{state.dtype} with strides {state.stride()}"
        raise SeqmixError(f"a decoding step expects an initial state that is float32 and contiguous, got {described}")
    if needs_grad(x.q, x.k, x.v, x.log_decay, state):
        raise SeqmixError("an in-place step has no gradients: decode under torch.no_grad()")
    (output,) = STEP_OP(x._replace(log_decay=None if x.log_decay is None else x.log_decay.float()))
    return output


# ---- the ops


def _allocate(x: Recurrence) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the output, the final state [N H K V] and the entry states of chunks [chunks H K V].

    The final state is empty unless requested, the entry states unless they are saved for the backward pass.
    """
    # checked inside the op, which a compiler does not trace
    KERNEL.require(x.probe())
    heads, key_width, value_width = x.state_shape
    final_state = x.q.new_empty((x.rows, *x.state_shape) if x.output_final_state else 0, dtype=torch.float32)
    chunk = configuration_of(x).chunk
    # save entry states if they are no larger than q, k and v; otherwise the backward pass scans again
    if not x.needs_grad or key_width * value_width > chunk * (2 * key_width + value_width):
        return x.new_output(), final_state, x.q.new_empty(0)
    states_per_row = capacity(x.q.shape[1], chunk, None if x.initial_state is None else x.cu_seqlens)
    entries = x.q.new_empty(x.q.shape[0] * states_per_row, heads, key_width, value_width)
    # packed documents may not use all rows, and an op's output must be defined everywhere
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
    inputs = {"v": x.v, "initial_state": x.initial_state}
    inputs["log_decay"] = x.log_decay if needs_log_decay or call.totals is not None else None
    out = {name: tensor.new_empty(tensor.shape) for name, tensor in inputs.items() if tensor is not None}
    out |= {name: x.q.new_empty(*x.v.shape[:3], call.key_width) for name in "qk"}
    # an operand of products in the inputs' dtype: the gradient of a float32 output is rounded here, once
    do = addressable(torch.zeros_like(x.v) if d_output is None else d_output.to(x.v.dtype), call.chunk)
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
    """Compute the output of one token, and update the initial state in place."""
    (output,) = _allocate_step(x)
    batch, (heads, key_width, value_width) = x.q.shape[0], x.state_shape
    tile, log_decay = STEP.tile[1], x.log_decay
    q, k, v = (addressable(tensor, 1) for tensor in (x.q, x.k, x.v))
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
        "shared": x.heads_per_key,
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
# a step has no matrix products, so TF32 makes no difference
declare(replace(STEP_KERNEL, backend="triton_tf32x3", tolerances={torch.float32: TOLERANCES[torch.float32]}))
