"""The decay family through flash-linear-attention's Triton kernels (notation of decay/api.py).

    log_decay     fla's function
    None          chunk_simple_gla, without gates
    [H]           chunk_simple_gla(g_gamma=a), which has no gradient for a; if one is needed, a is expanded to [B T H]
    [B T H]       chunk_simple_gla(g=a)
    [B T H K]     chunk_gla(g=a)

Layout, recurrence, scale and states agree with this library: natural logarithms, and a float32 state [N H K V] that
decays before the first token is added. Three things differ:

    Chunks always have 64 tokens: chunk_size is ignored. It changes the cost and never the result.
    fla subtracts sums of log-decays, and inf - inf is nan. So log-decays are clamped at MIN_LOG_DECAY, whose
    exponential is 0 in float32. The gradient of a clamped log-decay is 0.
    fla caches tables of document boundaries by the identity of the tensor. So a copy is passed, in case the boundaries
    are later changed in place. Making the tables waits for the device.

fla's functions cannot be compiled. In compiled code they are wrapped in one custom op, whose backward pass recomputes
the forward pass, because the tensors that fla saves are inside its own autograd function.

fla is imported only when it is called.
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
from ..runtime.kernel import Kernel, Probe, declare, is_installed
from ..runtime.paradigm import Paradigm

MIN_LOG_DECAY = -256 * math.log(2)
"""Lower bound of the log-decays passed to fla."""

SUSPECT_KEY_WIDTH = 64
"""Key width at which Triton may miscompile a product with a transposed tile on Hopper (fla-org issue 640)."""

SLOW_WIDTH = 256
"""Smallest width at which fla's backward pass is very slow on GPUs after Hopper: one of its tiles exceeds the shared
memory of a block, and the tiles that fit cannot use the matrix instructions."""


def limits(probe: Probe) -> list[str]:
    """Return the reasons, apart from the dtype, why this backend cannot run a call; empty if it can."""
    reasons = []
    if not is_installed("fla"):
        reasons.append("flash-linear-attention is not installed (pip install --no-deps fla-core)")
    if not is_installed("triton"):
        reasons.append("triton is not installed (pip install triton, on Linux)")
    if probe.device.type != "cuda":
        reasons.append(f"fla needs a CUDA device, got {probe.device.type}")
    if probe.wide_output:
        reasons.append("fla has no float32 output for 16-bit inputs")
    if probe.key_width % 2 or probe.value_width % 2:
        reasons.append(f"fla's backward pass needs even widths, got {probe.key_width} and {probe.value_width}")
    if probe.device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(probe.device)
        if probe.needs_grad and capability[0] == 9 and _is_miscompiled():
            if probe.log_decay == "B T H":
                reasons.append(
                    "the installed triton miscompiles fla's backward pass for decays per token on Hopper: "
                    "install triton 3.7.1"
                )
            if probe.log_decay == "H" and probe.key_width == SUSPECT_KEY_WIDTH:
                reasons.append(
                    f"fla's backward pass for decays per head and keys {SUSPECT_KEY_WIDTH} wide may be wrong on "
                    "Hopper, because the installed triton miscompiles the same product in another kernel: "
                    "install triton 3.7.1"
                )
        wide = max(probe.key_width, probe.value_width) >= SLOW_WIDTH
        if probe.needs_grad and wide and capability >= (10, 0) and probe.log_decay != "B T H K":
            reasons.append(
                f"fla's backward pass is very slow for widths of {SLOW_WIDTH} or more on GPUs of compute capability "
                f"{'.'.join(map(str, capability))}"
            )
    return reasons


@cache
def _is_miscompiled() -> bool:
    """Return True if fla itself refuses to run its backward pass on Hopper with the installed release of triton."""
    release = tuple(int(number) for number in re.findall(r"\d+", version("triton"))[:3])
    return (3, 4, 0) <= release < (3, 7, 1)


def decay_chunkwise_fla(x: Recurrence) -> RecurrenceOutput:
    """Compute the chunkwise paradigm of the decay family by fla.

    Raises:
        SeqmixError: `KERNEL` does not support the call.
    """
    x, log_decay = x.by_head(), x.log_decay
    if log_decay is not None:
        log_decay = log_decay.float().clamp(min=MIN_LOG_DECAY)
        if log_decay.ndim == 1 and log_decay.requires_grad:
            log_decay = log_decay.expand(*x.q.shape[:3])
    x = x._replace(log_decay=log_decay, initial_state=None if x.initial_state is None else x.initial_state.float())
    output, state = OP(x) if torch.compiler.is_compiling() else _chunkwise(OP.checked(x))
    return RecurrenceOutput(output, state if x.output_final_state else None)


def _chunkwise(x: Recurrence) -> tuple[Tensor, Tensor]:
    """Return the output, and the final state (empty unless requested); gradients come from fla's autograd function."""
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
    final = (x.rows, *x.state_shape) if x.output_final_state else (0,)
    return x.q.new_empty(x.v.shape), x.q.new_empty(final, dtype=torch.float32)


def _forward(x: Recurrence) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return _chunkwise(x)


def _backward(x: Recurrence, gradients: Gradients) -> dict[str, Tensor]:
    """Return the gradients; the forward pass is recomputed."""
    leaves = {
        name: getattr(x, name).detach().requires_grad_()
        for name in ("q", "k", "v", "log_decay", "initial_state")
        if name in gradients.wanted
    }
    with torch.enable_grad():
        # inside an op nothing else is recorded, so this graph is fla's function alone
        outputs = _chunkwise(x._replace(**leaves))
        pairs = [(y, d) for y, d in zip(outputs, gradients.outputs, strict=True) if d is not None and d.numel()]
        d_leaves = torch.autograd.grad([y for y, _ in pairs], list(leaves.values()), [d for _, d in pairs])
    return dict(zip(leaves, d_leaves, strict=True))


OP = Op("decay_chunkwise_fla", Recurrence, fake=_allocate, forward=_forward, backward=_backward, outputs=2)

KERNEL = declare(
    Kernel(
        op="decay",
        paradigm=Paradigm.CHUNKWISE,
        backend="fla",
        function=decay_chunkwise_fla,
        # no float32: fla would compute its products in TF32, with 11 bits of precision
        tolerances={torch.bfloat16: 1.5e-2, torch.float16: 1.8e-3},
        limits=limits,
        gradient_by_subtraction=True,
    )
)
