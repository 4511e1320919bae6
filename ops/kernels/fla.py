"""The decay family through flash-linear-attention's Triton kernels (notation of decay/api.py).

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
    fla caches tables of the boundaries by the identity of the tensor: a copy is passed, so that boundaries written in
    place are seen. Making the tables waits for the device.

fla's functions cannot be compiled. Compiled code has one custom op around them, whose backward pass recomputes the
forward, since what fla saves between the two is inside its autograd function.

fla is imported where it is called.
"""

import math
import re
from functools import cache
from importlib import import_module
from importlib.metadata import version

import torch
from torch import Tensor

from ..recurrence.family import Recurrence, RecurrenceOutput
from ..runtime.custom_op import Gradients, Op
from ..runtime.kernel import Kernel, Probe, declare, installed
from ..runtime.paradigm import Paradigm

LOWEST = -256 * math.log(2)
"""The lowest log-decay that is passed on."""

SUSPECT = 64
"""The width of keys at which a product of a transposed tile is miscompiled on Hopper (fla-org issue 640)."""

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
    if probe.wide_output:
        reasons.append("its output has the dtype of its inputs")
    if probe.key_width % 2 or probe.value_width % 2:
        reasons.append(f"its backward pass refuses odd widths, {probe.key_width} and {probe.value_width}")
    if probe.device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(probe.device)
        if probe.needs_grad and capability[0] == 9 and _is_miscompiled():
            if probe.log_decay == "B T H":
                reasons.append("with this triton its backward pass of given decays is wrong on Hopper: 3.7.1 is right")
            if probe.log_decay == "H" and probe.key_width == SUSPECT:
                reasons.append(
                    f"with this triton its backward pass of rates per head is suspect on Hopper where keys are "
                    f"{SUSPECT} wide: the product that goes wrong elsewhere is in it too; 3.7.1 is right"
                )
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


def decay_chunkwise_fla(x: Recurrence) -> RecurrenceOutput:
    """The chunkwise paradigm by fla.

    Raises:
        SeqmixError: `KERNEL` does not take this.
    """
    x, log_decay = x.by_head(), x.log_decay
    if log_decay is not None:
        log_decay = log_decay.float().clamp(min=LOWEST)
        if log_decay.ndim == 1 and log_decay.requires_grad:
            log_decay = log_decay.expand(*x.q.shape[:3])
    x = x._replace(log_decay=log_decay, initial_state=None if x.initial_state is None else x.initial_state.float())
    output, state = OP(x) if torch.compiler.is_compiling() else _chunkwise(OP.checked(x))
    return RecurrenceOutput(output, state if x.output_final_state else None)


def _chunkwise(x: Recurrence) -> tuple[Tensor, Tensor]:
    """Output and final state, which is empty unless wanted; with gradients by fla's own autograd function."""
    KERNEL.require(x.probe())
    options = {
        "scale": x.scale,
        "initial_state": x.initial_state,
        "output_final_state": x.output_final_state,
        "cu_seqlens": None if x.cu_seqlens is None else x.cu_seqlens.to(torch.int64, copy=True),
    }
    if x.log_decay is not None and x.log_decay.ndim == 4:
        output, state = import_module("fla.ops.gla").chunk_gla(x.q, x.k, x.v, x.log_decay, **options)
    else:
        gates = {} if x.log_decay is None else {"g_gamma" if x.log_decay.ndim == 1 else "g": x.log_decay}
        output, state = import_module("fla.ops.simple_gla").chunk_simple_gla(x.q, x.k, x.v, **gates, **options)
    return output, x.q.new_empty(0, dtype=torch.float32) if state is None else state


def _allocate(x: Recurrence) -> tuple[Tensor, Tensor]:
    KERNEL.require(x.probe())
    final = (x.rows, *x.matrix) if x.output_final_state else (0,)
    return x.q.new_empty(x.v.shape), x.q.new_empty(final, dtype=torch.float32)


def _forward(x: Recurrence) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return _chunkwise(x)


def _backward(x: Recurrence, gradients: Gradients) -> dict[str, Tensor]:
    """The gradients; recomputes the forward."""
    leaves = {
        name: getattr(x, name).detach().requires_grad_()
        for name in ("q", "k", "v", "log_decay", "initial_state")
        if name in gradients.wanted
    }
    with torch.enable_grad():
        # fla's own function is the whole graph: inside an op no other is recorded
        outputs = _chunkwise(x._replace(**leaves))
        given = [(y, d) for y, d in zip(outputs, gradients.outputs, strict=True) if d is not None and d.numel()]
        found = torch.autograd.grad([y for y, _ in given], list(leaves.values()), [d for _, d in given])
    return dict(zip(leaves, found, strict=True))


OP = Op("decay_chunkwise_fla", Recurrence, fake=_allocate, forward=_forward, backward=_backward, outputs=2)

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
