"""Launch code that all Triton kernels share: configurations, padding, strides, packed documents and requirements.

This module does not import triton; `kernels` does, when a kernel is launched.
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
from ...runtime.kernel import Probe, is_installed

UNIT = 16
"""Widths are padded to a multiple of this, the smallest that matrix instructions and 16-byte loads support."""

FUSED = {"enable_fp_fusion": True}
"""Compiler option to fuse a product and a sum (FMA); set explicitly, because Triton's default is about to change."""

REGISTERS = 65536
"""Registers of a multiprocessor."""


class Launch(NamedTuple):
    """Launch configuration of one jitted function."""

    tile: tuple[int, int]
    """Tile sizes: keys and values of a state's tile (scans over chunks), or inner width per step and output columns
    (products inside chunks)."""
    warps: int
    """Warps per block."""
    stages: int
    """Loop iterations whose loads are in flight at once."""
    blocks: int = 1
    """Number of blocks that must fit on a multiprocessor at once; this limits the registers per thread."""

    @property
    def options(self) -> dict[str, Any]:
        """Triton's launch options."""
        # registers are allocated in multiples of 8 per thread
        cap = {"maxnreg": REGISTERS // (32 * self.warps * self.blocks) // 8 * 8} if self.blocks > 1 else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **cap, **FUSED}


def is_interpreted() -> bool:
    """Return True if kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernels(family: str, module: str = "bodies") -> Any:
    """Return the module with the jitted functions of a family; imports triton."""
    return import_module(f"{__package__}.{family}.{module}")


def missing_requirements(probe: Probe) -> list[str]:
    """Return the reasons why no Triton kernel can run a call: no triton, no CUDA device, or (interpreted) its dtype."""
    reasons = []
    if not is_installed("triton"):
        reasons.append("triton is not installed (pip install triton, on Linux)")
    if is_interpreted():
        if probe.dtype == torch.bfloat16:
            reasons.append("Triton's interpreter computes bfloat16 wrongly")
    elif probe.device.type != "cuda":
        reasons.append(
            f"the Triton kernels need a CUDA device, got {probe.device.type} "
            "(or set TRITON_INTERPRET=1 before triton is imported)"
        )
    return reasons


def run_padded(op: Op[Recurrence], x: Recurrence) -> RecurrenceOutput:
    """Run a chunkwise op with widths padded to multiples of UNIT, and with float32 decays and states."""
    key_width, value_width = x.q.shape[3], x.v.shape[3]
    key_padding, value_padding = -key_width % UNIT, -value_width % UNIT
    log_decay = None if x.log_decay is None else x.log_decay.float()
    if log_decay is not None and log_decay.ndim == 4:
        log_decay = F.pad(log_decay, (0, key_padding))
    initial_state = None if x.initial_state is None else x.initial_state.float()
    x = x._replace(log_decay=log_decay, initial_state=initial_state)
    if key_padding or value_padding:
        if initial_state is not None:
            initial_state = F.pad(initial_state, (0, value_padding, 0, key_padding))
        x = x._replace(
            q=F.pad(x.q, (0, key_padding)),
            k=F.pad(x.k, (0, key_padding)),
            v=F.pad(x.v, (0, value_padding)),
            initial_state=initial_state,
        )
    output, state, *_ = op(x)
    if key_padding or value_padding:
        output = output[..., :value_width]
        if x.output_final_state:
            # a copy: a view would keep the padding alive
            state = state[..., :key_width, :value_width].contiguous()
    return RecurrenceOutput(output, state if x.output_final_state else None)


def chunk_table(cu_seqlens: Tensor, length: int, chunk: int, *, starts: bool, ends: bool) -> tuple[Tensor, Tensor]:
    """Divide packed documents into chunks, without waiting for the device.

    Args:
        cu_seqlens: boundaries of the documents, [N + 1].
        length: tokens of the row.
        chunk: tokens per chunk.
        starts: True if documents have initial states. Otherwise these are zero, and all documents share one entry.
        ends: True if final states of documents have gradients. Otherwise these are zero, and all share one entry.

    Returns:
        the index of each document's first chunk [N + 1], and a table [chunks 4]: a chunk's first token, its number of
        tokens, the index of its stored entry state, and the index of the gradient of its exit state. The table has the
        most rows that any boundaries need; surplus rows have 0 tokens.
    """
    boundaries = cu_seqlens.long()
    firsts = F.pad(((boundaries.diff() + chunk - 1) // chunk).cumsum(0), (1, 0))
    n_documents = boundaries.shape[0] - 1
    index = torch.arange(capacity(length, chunk, cu_seqlens), device=boundaries.device)
    document = (torch.searchsorted(firsts, index, right=True) - 1).clamp_(max=n_documents - 1)
    index_in_document = index - firsts[document]
    start = boundaries[document] + index_in_document * chunk
    tokens = (boundaries[document + 1] - start).clamp_(0, chunk)
    entering, leaving = index, index
    if not (starts and ends):
        # only states between two chunks of a document are stored, after the shared zero
        inner = F.pad((firsts.diff() - 1).clamp_(min=0).cumsum(0), (1, 0))[document] + index_in_document
        entering = index if starts else torch.where(index_in_document > 0, inner, 0)
        leaving = index if ends else torch.where(start + chunk < boundaries[document + 1], inner + 1, 0)
    return firsts, torch.stack((start, tokens, entering, leaving), dim=1)


def addressable(x: Tensor, chunk: int) -> Tensor:
    """Return x [B T H D] itself if D is contiguous and the offsets in a chunk fit 32 bits, else a contiguous copy."""
    return x if x.stride(3) == 1 and min(chunk, x.shape[1]) * x.stride(1) < 2**31 else x.contiguous()


def contiguous(state: Tensor | None) -> Tensor | None:
    """Return a state as a contiguous tensor; None stays None."""
    return None if state is None else state.contiguous()


def strides(*axes: str, **tensors: Tensor) -> dict[str, int]:
    """Return the strides of tensors, for some axes or all, named like the arguments of jitted functions: `q_row`."""
    numbers = {"row": 0, "token": 1, "head": 2}
    return {f"{name}_{axis}": x.stride(numbers[axis]) for name, x in tensors.items() for axis in axes or numbers}
