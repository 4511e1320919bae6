"""Softmax attention through torch's FlexAttention (notation of attention/api.py).

    visible(n, m) = place(m) <= place(n)                    causal, a cache too
                    place(m) > place(n) - w                 under a window
                    document(m) = document(n)               with packed documents

is a function of two indices, which the compiler puts into the kernel; the places of a cache's slots, and documents, are
tensors that it reads there. Which tiles the kernel visits is decided by the lowest and highest place and document of
each block of 128 queries or keys, so nothing here is as large as T x M:

    none of it visible    by these bounds, the tile is skipped
    all of it visible     by these bounds, the function is not called
    else                  it is called for every pair, so a bound that is too wide costs time, never correctness

The kernel exists in compiled code only. In eager mode FlexAttention materializes all scores: on a CPU, where tests use
it, that is left as it is; on a GPU the call is compiled.

FlexAttention is imported where it is called.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.api import TOLERANCES
from ..attention.inputs import AttentionInputs, AttentionOutput, factored, require_range, without_scores
from ..attention.kv_cache import Offer
from ..runtime.kernel import Kernel, Probe, declare
from ..runtime.paradigm import Paradigm

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries or keys that are skipped together; FlexAttention's own default."""

MIN_WIDTH = 16
"""Of keys and values, in its kernels for GPUs: the smallest product that their matrix instructions have."""


def limits(probe: Probe) -> list[str]:
    """Why it cannot run what it is asked about, beside the dtype."""
    device = probe.device.type
    reasons = without_scores("flex", probe)
    if device not in ("cpu", "cuda"):
        return [f"it runs on CUDA devices and CPUs, not on {device}"]
    if device == "cpu" and probe.needs_grad:
        reasons.append("FlexAttention has no backward pass on a CPU")
    if device == "cuda" and probe.dtype == torch.float64:
        reasons.append("its kernels for GPUs do not take float64")
    if device == "cuda" and min(probe.key_width, probe.value_width) < MIN_WIDTH:
        reasons.append(
            f"on a GPU keys and values are at least {MIN_WIDTH} wide, not {probe.key_width} and {probe.value_width}"
        )
    return reasons


def softmax_parallel_flex(x: AttentionInputs) -> AttentionOutput:
    """The parallel paradigm by FlexAttention: what it sees is known block by block, and never stored pair by pair.

    Raises:
        SeqmixError: `KERNEL` does not take this.
    """
    KERNEL.require(x.probe())
    require_range(x.log_decay, x.q.shape[1], x.q.dtype)
    offer = x.offer()
    query, keys = factored(x.q, 0, offer, x.log_decay)
    output = _flex(x.q.device)(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        offer.values.transpose(1, 2),
        block_mask=block_mask(x.q.shape[1], offer, x.window),
        scale=x.scale,
        enable_gqa=x.q.shape[2] != x.k.shape[2],
    )
    return output.transpose(1, 2).to(x.q.dtype), x.final()


def _flex(device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention as it is called here."""
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

    # it would retrace its own call for every shape even so, and it warns that this is slow
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return flex_attention(*args, **options)


# ---- what is seen


def visible(offer: Offer, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The function of a row, a head, a query and a key (by their indices) that says whether the query sees the key."""
    places = offer.places
    documents = offer.documents
    shared = places.shape[0] == 1

    def mask(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del head
        # without a cache a key's place is its index: no lookup
        place = key if offer_is_own else places[0, key] if shared else places[row, key]
        seen = place <= query
        if window is not None:
            seen = seen & (place > query - window)
        if documents is not None:
            seen = seen & (documents[0][key] == documents[1][query])
        return seen

    offer_is_own = offer.cached == 0
    return mask


def block_mask(length: int, offer: Offer, window: int | None) -> "BlockMask":
    """What `length` queries see of an offer, as FlexAttention takes it."""
    from torch.nn.attention.flex_attention import BlockMask

    some, every = blocks(length, offer, window)
    partial = some & ~every
    full = every
    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible(offer, window),
        seq_lengths=(length, offer.keys.shape[1]),
    )


def blocks(length: int, offer: Offer, window: int | None) -> tuple[Tensor, Tensor]:
    """Of each block of queries and of keys: whether some pair may be visible, and whether all are, [_ 1 Q M]."""
    rest = -length % BLOCK
    query = torch.arange(length + rest, device=offer.places.device).clamp(max=length - 1)
    first_q, last_q = _bounds(query[None], "row")
    # slots after the end are seen by no query
    first_k, last_k = _bounds(F.pad(offer.places, (0, -offer.places.shape[1] % BLOCK), value=length), "column")
    some = first_k <= last_q
    every = last_k <= first_q
    if rest:  # as torch's own masks have it, a block that is not whole is never seen as a whole
        every = every & (torch.arange(first_q.shape[1], device=every.device) < length // BLOCK)[None, :, None]
    if window is not None:
        some = some & (last_k > first_q - window)
        every = every & (first_k > last_q - window)
    if offer.documents is not None:
        of_keys, of_queries = (_padded(x)[None] for x in offer.documents)
        lowest_q, highest_q = _bounds(of_queries, "row")
        lowest_k, highest_k = _bounds(of_keys, "column")
        some = some & (lowest_k <= highest_q) & (lowest_q <= highest_k)
        every = every & (lowest_k == highest_q) & (lowest_q == highest_k)
    return some[:, None], every[:, None]


def _padded(x: Tensor) -> Tensor:
    """[n] with its last element repeated to whole blocks."""
    return torch.cat((x, x[-1:].expand(-x.shape[0] % BLOCK)))


def _bounds(x: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    """The lowest and highest of each block of [_ n], as a row's or a column's of a table of blocks."""
    by_block = x.unflatten(1, (-1, BLOCK))
    bounds = by_block.amin(-1), by_block.amax(-1)
    low, high = (bound[:, :, None] if axis == "row" else bound[:, None, :] for bound in bounds)
    return low, high


def _ordered(table: Tensor) -> tuple[Tensor, Tensor]:
    """The number of blocks that a row of a table has, and their columns, those first."""
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
