"""The decay family through flash-linear-attention's Triton kernels (notation of decay.py).

    log_decay     fla's function
    None          chunk_simple_gla, without gates
    [H]           chunk_simple_gla(g_gamma=a); fla gives that no gradient, so where one is wanted, as [B T H]
    [B T H]       chunk_simple_gla(g=a)
    [B T H K]     chunk_gla(g=a)

Layout, recurrence, scale and states are the same as here: natural logarithms, and a state [N H K V] in float32 that
decays before the first token is added. What differs, and what is done about it:

    A chunk is 64 tokens: chunk_size is not read. It changes the cost and never the result.
    Sums of log-decays inside a chunk are subtracted, and inf - inf is nan: log-decays are clamped at LOWEST first,
    whose exponential is 0 in float32. Where that clamps, the gradient is 0.
    Tables made of the borders are kept by the identity of the tensor: a copy is passed, so that borders written in
    place are seen. Making the tables waits for the device.

fla's functions cannot be compiled. Compiled code has one custom op around them, whose backward pass computes the
forward again, since what fla keeps between the two is inside its autograd function.

fla is imported where it is called.
"""

import math
import re
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..autograd import refuse_tangents
from ..kernels import Kernel, Probe, declare, installed
from ..paradigm import Paradigm
from .api import NO_TANGENTS, DecayOutput, LogDecay, probe_of, require_inputs

LOWEST = -256 * math.log(2)
"""The lowest log-decay that is passed on."""

COLLAPSES_AT = 256
"""The width from which fla's backward is slow: on a GPU after Hopper one of its tiles exceeds the shared memory of a
block, and what is left to it cannot use the matrix instructions."""


def limits(probe: Probe) -> list[str]:
    """Why it cannot run what it is asked about, beside the dtype."""
    reasons = []
    if not installed("fla"):
        reasons.append("flash-linear-attention is not installed (pip install --no-deps fla-core)")
    if not installed("triton"):
        reasons.append("triton is not installed (pip install 'seqmix[gpu]', on Linux)")
    if probe.device.type != "cuda":
        reasons.append(f"it needs a CUDA device and not {probe.device.type}")
    if probe.key_width % 2 or probe.value_width % 2:
        reasons.append(f"its backward pass refuses odd widths, {probe.key_width} and {probe.value_width}")
    if probe.device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(probe.device)
        if probe.needs_grad and probe.log_decay == "B T H" and capability[0] == 9 and _is_miscompiled():
            reasons.append("with this triton its backward pass of given decays is wrong on Hopper: 3.7.1 is right")
        wide = max(probe.key_width, probe.value_width) >= COLLAPSES_AT
        if probe.needs_grad and wide and capability >= (10, 0) and probe.log_decay != "B T H K":
            reasons.append(
                f"its backward pass collapses from a width of {COLLAPSES_AT} on a device of compute capability "
                f"{'.'.join(map(str, capability))}"
            )
    return reasons


@cache
def _is_miscompiled() -> bool:
    """Whether the installed triton is one that fla refuses to run this backward with."""
    release = tuple(int(number) for number in re.findall(r"\d+", version("triton"))[:3])
    return (3, 4, 0) <= release < (3, 7, 1)


def decay_chunkwise_fla(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: LogDecay,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
    chunk_size: int = 64,
) -> DecayOutput:
    """`decay_chunkwise` by fla; arguments and result are its own.

    Raises:
        SeqmixError: shapes do not fit, or `KERNEL` does not take this.
    """
    scale = require_inputs(q, k, v, log_decay, scale, initial_state, cu_seqlens, chunk_size)
    refuse_tangents(NO_TANGENTS, q, k, v, log_decay, initial_state)
    if log_decay is not None:
        log_decay = log_decay.float().clamp(min=LOWEST)
        if log_decay.ndim == 1 and log_decay.requires_grad:
            log_decay = log_decay.expand(*q.shape[:3])
    if initial_state is not None:
        initial_state = initial_state.float()
    call = chunkwise_op if torch.compiler.is_compiling() else _chunkwise
    output, state = call(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state)
    return DecayOutput(output, state if output_final_state else None)


def _chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """Output and final state, which is empty unless wanted; with gradients by fla's own autograd function."""
    KERNEL.require(probe_of(q, k, v, log_decay, initial_state))
    options = {
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.to(torch.int64, copy=True),
    }
    if log_decay is not None and log_decay.ndim == 4:
        output, state = import_module("fla.ops.gla").chunk_gla(q, k, v, log_decay, **options)
    else:
        gates = {} if log_decay is None else {"g_gamma" if log_decay.ndim == 1 else "g": log_decay}
        output, state = import_module("fla.ops.simple_gla").chunk_simple_gla(q, k, v, **gates, **options)
    return output, q.new_empty(0, dtype=torch.float32) if state is None else state


@torch.library.custom_op("seqmix::decay_chunkwise_fla", mutates_args=())
def chunkwise_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """As `_chunkwise`."""
    with torch.no_grad():
        return _chunkwise(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state)


@chunkwise_op.register_fake
def _allocate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    KERNEL.require(probe_of(q, k, v, log_decay, initial_state))
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = (rows, *q.shape[2:], v.shape[3]) if output_final_state else (0,)
    return q.new_empty(v.shape), q.new_empty(final, dtype=torch.float32)


@torch.library.custom_op("seqmix::decay_chunkwise_fla_backward", mutates_args=())
def chunkwise_backward_op(
    d_output: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    needs_log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, d log_decay and d initial state; the last two are empty where there is nothing to differentiate."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    leaves = [q, k, v]
    if log_decay is not None:
        log_decay = log_decay.detach().requires_grad_(needs_log_decay)
        leaves += [log_decay] if needs_log_decay else []
    if initial_state is not None:
        initial_state = initial_state.detach().requires_grad_()
        leaves.append(initial_state)
    with torch.enable_grad():
        # fla's own function is the whole graph: inside an op no other is recorded
        output, state = _chunkwise(q, k, v, log_decay, initial_state, cu_seqlens, scale, d_state.numel() > 0)
        outputs, above = ([output, state], [d_output, d_state]) if d_state.numel() else ([output], [d_output])
        found = torch.autograd.grad(outputs, leaves, above)
    dq, dk, dv, *rest = (gradient.to(x.dtype).contiguous() for gradient, x in zip(found, leaves, strict=True))
    nothing = d_output.new_empty(0)
    d_log_decay = rest.pop(0) if needs_log_decay else nothing
    return dq, dk, dv, d_log_decay, rest.pop() if rest else nothing


@chunkwise_backward_op.register_fake
def _allocate_backward(
    d_output: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    needs_log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor | None) -> Tensor:
        return d_output.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(q), like(k), like(v), like(log_decay if needs_log_decay else None), like(initial_state)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    del output
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_output: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
    needs_log_decay = ctx.needs_input_grad[3]
    *gradients, d_log_decay, d_initial = chunkwise_backward_op(
        d_output, d_state, *ctx.saved_tensors, ctx.scale, needs_log_decay
    )
    has_state = ctx.saved_tensors[4] is not None
    return (
        *gradients,
        d_log_decay if needs_log_decay else None,
        d_initial if has_state else None,
        *(None,) * 3,
    )


chunkwise_op.register_autograd(_backward, setup_context=_save_for_backward)


KERNEL = declare(
    Kernel(
        op="decay",
        paradigm=Paradigm.CHUNKWISE,
        backend="fla",
        function=decay_chunkwise_fla,
        # no float32: its products are then of TF32, which has 11 bits
        tolerances={torch.bfloat16: 1.5e-2, torch.float16: 1.8e-3},
        limits=limits,
        differences=True,
    )
)
