"""Softmax attention through torch's FlexAttention (notation of attention/api.py). A query n sees a key m if

    visible(n, m) = place(m) <= place(n)                    causal, also in a cache
                    place(m) > place(n) - w                 under a window
                    document(m) = document(n)               with packed documents

The compiler puts this function of two indices into the kernel; places and documents are tensors that it reads there.
Which tiles the kernel visits follows from the lowest and highest place and document of each block of 128 queries or
keys, so no tensor here is as large as T x M. By these bounds, a tile is

    invisible             and skipped
    entirely visible      and computed without calling the function
    anything else         and the function is called for every pair: loose bounds cost time, never correctness

The fused kernel exists in compiled code only. In eager mode FlexAttention materializes all scores: on a CPU, where
tests use it, it runs eagerly; on a GPU the call is compiled.

FlexAttention is imported only when it is called.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.api import TOLERANCES
from ..attention.inputs import AttentionInputs, AttentionOutput, apply_decay, require_range, unsupported_scores
from ..attention.kv_cache import KeyValues
from ..runtime.kernel import Kernel, Probe, declare
from ..runtime.paradigm import Paradigm

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries or keys per block, FlexAttention's default."""

MIN_WIDTH = 16
"""Smallest width of keys and values in the GPU kernels, that of their matrix instructions."""


def limits(probe: Probe) -> list[str]:
    """Return the reasons, apart from the dtype, why this backend cannot run a call; empty if it can."""
    device = probe.device.type
    reasons = unsupported_scores("flex", probe)
    if device not in ("cpu", "cuda"):
        return [f"FlexAttention runs on CUDA devices and CPUs, got {device}"]
    if device == "cpu" and probe.needs_grad:
        reasons.append("FlexAttention has no backward pass on a CPU")
    if device == "cuda" and probe.dtype == torch.float64:
        reasons.append("FlexAttention's GPU kernels do not support float64")
    if device == "cuda" and min(probe.key_width, probe.value_width) < MIN_WIDTH:
        reasons.append(
            f"FlexAttention's GPU kernels need keys and values at least {MIN_WIDTH} wide, "
            f"got {probe.key_width} and {probe.value_width}"
        )
    return reasons


def softmax_parallel_flex(x: AttentionInputs) -> AttentionOutput:
    """Compute softmax attention in the parallel paradigm by FlexAttention, with a mask stored per block, not per pair.

    Raises:
        SeqmixError: `KERNEL` does not support the call.
    """
    KERNEL.require(x.probe())
    require_range(x.log_decay, x.q.shape[1], x.q.dtype)
    kv = x.key_values()
    query, keys = apply_decay(x.q, 0, kv, x.log_decay)
    output = _flex(x.q.device)(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        kv.values.transpose(1, 2),
        block_mask=block_mask(x.q.shape[1], kv, x.window),
        scale=x.scale,
        enable_gqa=x.q.shape[2] != x.k.shape[2],
    )
    return output.transpose(1, 2).to(x.q.dtype), x.final()


def _flex(device: torch.device) -> Callable[..., Tensor]:
    """Return FlexAttention as it must be called: as it is inside compiled code, eager on a CPU, compiled on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling():
        return flex_attention
    return _eager if device.type == "cpu" else _compiled()


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _eager(*args: Any, **options: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    # without force_eager, FlexAttention would retrace itself for every shape; its warning says that eager mode is slow
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return flex_attention(*args, **options)


# ---- masks


def make_mask_mod(kv: KeyValues, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return FlexAttention's mask function: indices (row, head, query, key) -> True if the query sees the key."""
    places = kv.places
    documents = kv.documents
    rows_share_places = places.shape[0] == 1
    place_is_index = kv.cached == 0  # no lookup needed

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del head
        place = key if place_is_index else places[0, key] if rows_share_places else places[row, key]
        visible = place <= query
        if window is not None:
            visible = visible & (place > query - window)
        if documents is not None:
            visible = visible & (documents[0][key] == documents[1][query])
        return visible

    return mask_mod


def block_mask(length: int, kv: KeyValues, window: int | None) -> "BlockMask":
    """Return FlexAttention's block mask of `length` queries."""
    from torch.nn.attention.flex_attention import BlockMask

    some_visible, all_visible = visible_blocks(length, kv, window)
    return BlockMask.from_kv_blocks(
        *_block_lists(some_visible & ~all_visible),
        *_block_lists(all_visible),
        BLOCK_SIZE=BLOCK,
        mask_mod=make_mask_mod(kv, window),
        seq_lengths=(length, kv.keys.shape[1]),
    )


def visible_blocks(length: int, kv: KeyValues, window: int | None) -> tuple[Tensor, Tensor]:
    """Return two Boolean tables [_ 1 Q M] over blocks of queries and keys.

    The first is True where some pair may be visible, the second where all pairs are.
    """
    padding = -length % BLOCK
    query = torch.arange(length + padding, device=kv.places.device).clamp(max=length - 1)
    first_q, last_q = _block_bounds(query[None], "row")
    # padded keys are at a place that no query sees
    first_k, last_k = _block_bounds(F.pad(kv.places, (0, -kv.places.shape[1] % BLOCK), value=length), "column")
    some = first_k <= last_q
    every = last_k <= first_q
    if padding:  # as in torch's own masks, an incomplete block never counts as entirely visible
        every = every & (torch.arange(first_q.shape[1], device=every.device) < length // BLOCK)[None, :, None]
    if window is not None:
        some = some & (last_k > first_q - window)
        every = every & (first_k > last_q - window)
    if kv.documents is not None:
        of_keys, of_queries = (_pad_to_blocks(x)[None] for x in kv.documents)
        lowest_q, highest_q = _block_bounds(of_queries, "row")
        lowest_k, highest_k = _block_bounds(of_keys, "column")
        some = some & (lowest_k <= highest_q) & (lowest_q <= highest_k)
        every = every & (lowest_k == highest_q) & (lowest_q == highest_k)
    return some[:, None], every[:, None]


def _pad_to_blocks(x: Tensor) -> Tensor:
    """Pad x [n] to whole blocks by repeating its last element."""
    return torch.cat((x, x[-1:].expand(-x.shape[0] % BLOCK)))


def _block_bounds(x: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    """Return the minimum and maximum of each block of x [_ n], shaped to broadcast over a table of blocks.

    `axis` is "row" if the blocks are rows of the table, "column" if they are its columns.
    """
    by_block = x.unflatten(1, (-1, BLOCK))
    bounds = by_block.amin(-1), by_block.amax(-1)
    low, high = (bound[:, :, None] if axis == "row" else bound[:, None, :] for bound in bounds)
    return low, high


def _block_lists(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row of a table the number of True entries, and all columns, those of True entries first."""
    numbers = table.to(torch.int32)
    return numbers.sum(-1, dtype=torch.int32), numbers.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


KERNEL = declare(
    Kernel(
        op="softmax",
        paradigm=Paradigm.PARALLEL,
        backend="flex",
        function=softmax_parallel_flex,
        tolerances=TOLERANCES,
        limits=limits,
        higher_order=True,
    )
)
