"""How the Triton kernels of all families are launched: configurations, widths, strides, documents, what they need.

This module needs no triton: it is imported where a kernel is launched.
"""

import os
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...recurrence.family import Recurrence, RecurrenceOutput
from ...recurrence.groups import capacity
from ...runtime.custom_op import Op
from ...runtime.kernel import Probe, installed

UNIT = 16
"""Widths are padded to a multiple of it: matrix instructions and 16-byte loads want no less."""

FUSED = {"enable_fp_fusion": True}
"""A product and a sum are one instruction; explicit, since Triton's default is about to change."""

REGISTERS = 65536
"""Of a multiprocessor."""


class Launch(NamedTuple):
    """How one body runs."""

    tile: tuple[int, int]
    """Of a scan, keys and values of a state's tile; of a band, inner width per step and columns of the result."""
    warps: int
    stages: int
    """Steps of a loop whose loads are in flight at once."""
    blocks: int = 1
    """Blocks that a multiprocessor holds: registers are capped for them, and what a compiler makes is held to it."""

    @property
    def options(self) -> dict[str, Any]:
        """For the launcher."""
        # registers are given to threads by eights
        cap = {"maxnreg": REGISTERS // (32 * self.warps * self.blocks) // 8 * 8} if self.blocks > 1 else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **cap, **FUSED}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernels(family: str, module: str = "bodies") -> Any:
    """The jitted functions of a family; imports triton."""
    return import_module(f"{__package__}.{family}.{module}")


def missing(probe: Probe) -> list[str]:
    """What is not there that every kernel here needs."""
    reasons = []
    if not installed("triton"):
        reasons.append("triton is not installed (pip install 'seqmix[gpu]', on Linux)")
    if interpreted():
        if probe.dtype == torch.bfloat16:
            reasons.append("bfloat16 is wrong in Triton's interpreter")
    elif probe.device.type != "cuda":
        reasons.append(
            f"it needs a CUDA device and not {probe.device.type}, or TRITON_INTERPRET=1 before triton is imported"
        )
    return reasons


def padded(op: Op[Recurrence], x: Recurrence) -> RecurrenceOutput:
    """What a chunkwise op makes of a call, in widths that are multiples of UNIT; decays and states are float32."""
    key_width, value_width, wanted = x.q.shape[3], x.v.shape[3], x.output_final_state
    more_keys, more_values = -key_width % UNIT, -value_width % UNIT
    log_decay = None if x.log_decay is None else x.log_decay.float()
    if log_decay is not None and log_decay.ndim == 4:
        log_decay = F.pad(log_decay, (0, more_keys))
    x = x._replace(log_decay=log_decay, initial_state=None if x.initial_state is None else x.initial_state.float())
    if more_keys or more_values:
        x = x._replace(
            q=F.pad(x.q, (0, more_keys)),
            k=F.pad(x.k, (0, more_keys)),
            v=F.pad(x.v, (0, more_values)),
            initial_state=None if x.initial_state is None else F.pad(x.initial_state, (0, more_values, 0, more_keys)),
        )
    output, state, *_ = op(x)
    if more_keys or more_values:
        output = output[..., :value_width]
        if wanted:
            # a copy: a view would keep the padding alive
            state = state[..., :key_width, :value_width].contiguous()
    return RecurrenceOutput(output, state if wanted else None)


def chunk_table(cu_seqlens: Tensor, length: int, chunk: int, *, starts: bool, ends: bool) -> tuple[Tensor, Tensor]:
    """How packed documents are cut; nothing waits for the device.

    Args:
        starts: whether states enter documents. Else those that do are zero, and one is stored for all of them.
        ends: the same, of the gradients of states that leave documents.

    Returns:
        each document's first chunk [N + 1], and each chunk's first token and number of tokens, which is 0 for those
        that are over, as there is room for as many as there can be; and where the state is stored that enters it, and
        the gradient of what leaves it [chunks 4].
    """
    boundaries = cu_seqlens.long()
    firsts = F.pad(((boundaries.diff() + chunk - 1) // chunk).cumsum(0), (1, 0))
    documents = boundaries.shape[0] - 1
    number = torch.arange(capacity(length, chunk, cu_seqlens), device=boundaries.device)
    document = (torch.searchsorted(firsts, number, right=True) - 1).clamp_(max=documents - 1)
    own = number - firsts[document]
    start = boundaries[document] + own * chunk
    tokens = (boundaries[document + 1] - start).clamp_(0, chunk)
    entering, leaving = number, number
    if not (starts and ends):
        # of a document's chunks, all but one leave their state to the next
        inner = F.pad((firsts.diff() - 1).clamp_(min=0).cumsum(0), (1, 0))[document] + own
        entering = number if starts else torch.where(own > 0, inner, 0)
        leaving = number if ends else torch.where(start + chunk < boundaries[document + 1], inner + 1, 0)
    return firsts, torch.stack((start, tokens, entering, leaving), dim=1)


def readable(x: Tensor, chunk: int) -> Tensor:
    """x [B T H D] as it lies, if its rows are contiguous and a chunk's offsets fit 32 bits."""
    return x if x.stride(3) == 1 and min(chunk, x.shape[1]) * x.stride(1) < 2**31 else x.contiguous()


def contiguous(state: Tensor | None) -> Tensor | None:
    """A state that may be missing, contiguous."""
    return None if state is None else state.contiguous()


def strides(*axes: str, **tensors: Tensor) -> dict[str, int]:
    """As the jitted functions name them, of some axes or all."""
    numbers = {"row": 0, "token": 1, "head": 2}
    return {f"{name}_{axis}": x.stride(numbers[axis]) for name, x in tensors.items() for axis in axes or numbers}
