"""Places of keys and blocks: which slots of a cache hold the tokens of a document, in order (notation of api.py).

The rank of a key is its index among all keys of its row in the order of (document, position); empty slots come last. In
ranks, a document is a range, and a query sees the keys from its document's first rank to its own. A block is a range of
`block_size` positions from the document's first token on. Blocks are numbered over all documents of a row.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..attention.inputs import AttentionInputs
from ..attention.kv_cache import KeyValues, is_known_empty
from .scores import tree_sum

DOCUMENT = 2**40
"""Factor of the document's number in the sort key of a token; positions are smaller."""
EMPTY = torch.iinfo(torch.int64).max
"""Sort key of an empty slot."""


class Layout(NamedTuple):
    """Ranks of queries and blocks."""

    order: Int[Tensor, "_ M"] | None
    """Slot of each rank; None if slots are in the order of ranks."""
    own: Int[Tensor, "_ T"]
    """Rank of each query's own key."""
    first: Int[Tensor, "_ T"]
    """Rank of the first key of each query's document."""
    first_block: Int[Tensor, "_ T"]
    """Number of the first block of each query's document."""
    own_block: Int[Tensor, "_ T"]
    """Number of the block of each query."""
    complete: Int[Tensor, "_ T"]
    """Number after the last block that is complete at each query."""
    starts: Int[Tensor, "_ P"]
    """Rank of the first key of each block; below the document's first rank if the cache lacks that key."""
    block_first: Int[Tensor, "_ P"]
    """Rank of the first key of each block's document."""

    def part(self, start: int, stop: int, blocks: int) -> "Layout":
        """Return the layout of the queries from `start` to `stop` - 1, and of the first blocks."""
        tokens = slice(start, stop)
        return Layout(
            self.order,
            self.own[:, tokens],
            self.first[:, tokens],
            self.first_block[:, tokens],
            self.own_block[:, tokens],
            self.complete[:, tokens],
            self.starts[:, :blocks],
            self.block_first[:, :blocks],
        )

    def slots(self, ranks: Int[Tensor, "B *places"]) -> Int[Tensor, "B *places"]:
        """Return the slots of ranks, all of which must exist."""
        if self.order is None:
            return ranks
        rows = ranks.shape[0]
        return self.order.expand(rows, -1).gather(1, ranks.flatten(1)).view(ranks.shape)


def n_blocks(slots: int, block_size: int, *, aligned: bool) -> int:
    """Return the largest number of blocks that have some of the keys; `aligned` if the first key begins a block."""
    return -(-slots // block_size) if aligned else (slots + block_size - 2) // block_size + 1


def is_aligned(x: AttentionInputs) -> bool:
    """Return True if all keys are known to be there from the first token on, so that they begin with a block."""
    return x.key_cache is None or is_known_empty(x.key_cache)


def layout_of(x: AttentionInputs, kv: KeyValues, block_size: int) -> Layout:
    """Return the layout of a segment's queries over the keys that `AttentionInputs` provides."""
    return _row_layout(x, kv, block_size) if kv.documents is None else _packed_layout(x, kv, block_size)


def _row_layout(x: AttentionInputs, kv: KeyValues, block_size: int) -> Layout:
    """Return the layout of rows of one document each."""
    length = x.q.shape[1]
    slots = kv.keys.shape[1]
    aligned = is_aligned(x)
    queries = torch.arange(length, device=x.q.device)
    blocks = torch.arange(n_blocks(slots, block_size, aligned=aligned), device=x.q.device)[None]
    present = (kv.places < length).sum(-1, keepdim=True)
    own = present - length + queries
    missing = 0 if x.cache is None else x.cache.length[:, None] + length - present  # tokens that are not cached
    phase = missing % block_size
    starts = blocks * block_size - phase
    zero = torch.zeros_like(own)
    return Layout(
        None if aligned and kv.cached == 0 else kv.places.argsort(-1),
        own,
        zero,
        zero,
        (own + phase) // block_size,
        (own + phase + 1) // block_size,
        starts,
        torch.zeros_like(starts),
    )


def _packed_layout(x: AttentionInputs, kv: KeyValues, block_size: int) -> Layout:
    """Return the layout of a packed row whose boundaries the host does not know."""
    assert kv.documents is not None
    assert x.documents is not None
    of_key, of_query = kv.documents
    cu_seqlens = x.documents.cu_seqlens.long()
    number = x.documents.number
    length, slots = x.q.shape[1], kv.keys.shape[1]
    before = torch.zeros_like(cu_seqlens[1:]) if x.cache is None else x.cache.length
    present = kv.places[0] < length
    position = kv.places[0] - (cu_seqlens[:-1] - before)[of_key]
    order = torch.where(present, of_key * DOCUMENT + position, EMPTY).argsort()
    rank = order.argsort()
    sorted_documents = torch.where(present, of_key, number)[order]
    first = torch.searchsorted(sorted_documents, torch.arange(number + 1, device=order.device))
    count = first.diff()
    phase = (before + cu_seqlens.diff() - count) % block_size
    blocks = (phase + count + block_size - 1) // block_size
    block_stop = blocks.cumsum(0)
    block_start = block_stop - blocks
    numbers = torch.arange(slots // block_size + 2 * number, device=order.device)
    of_block = torch.searchsorted(block_stop, numbers, right=True).clamp(max=number - 1)
    own = rank[kv.cached + torch.arange(length, device=order.device)]
    places = own - first[of_query] + phase[of_query]
    return Layout(
        order[None],
        own[None],
        first[of_query][None],
        block_start[of_query][None],
        (block_start[of_query] + places // block_size)[None],
        (block_start[of_query] + (places + 1) // block_size)[None],
        (first[of_block] - phase[of_block] + (numbers - block_start[of_block]) * block_size)[None],
        first[of_block][None],
    )


def between(layout: Layout, stop: Tensor) -> Bool[Tensor, "_ 1 T P"]:
    """Return True for the blocks of each query's document before `stop`."""
    number = torch.arange(layout.starts.shape[1], device=stop.device)
    return ((number >= layout.first_block[..., None]) & (number < stop[..., None]))[:, None]


def block_means(x: Float[Tensor, "B M G K"], layout: Layout, block_size: int) -> Float[Tensor, "B P G K"]:
    """Return the mean of each block, summed in a fixed order; that of an open block is not to be used."""
    return tree_sum(block_tokens(x, layout, block_size), dim=2) / block_size


def block_tokens(x: Float[Tensor, "B M G K"], layout: Layout, block_size: int) -> Float[Tensor, "B P L G K"]:
    """Return the L = `block_size` vectors of each block in order, zeros where the cache lacks one."""
    blocks = layout.starts.shape[1]
    slots = x.shape[1]
    if layout.order is None:
        return F.pad(x, (0, 0, 0, 0, 0, blocks * block_size - slots)).unflatten(1, (blocks, block_size))
    ranks = layout.starts[..., None] + torch.arange(block_size, device=x.device)
    exists = (ranks >= layout.block_first[..., None]) & (ranks < slots)
    ranks = ranks.clamp(0, slots - 1).expand(x.shape[0], -1, -1)
    rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return torch.where(exists[..., None, None], x[rows, layout.slots(ranks)], 0)
