"""Attention of a segment over chosen keys, in each paradigm (notation of api.py)."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..attention.inputs import AttentionInputs
from ..attention.kv_cache import Cache, KeyValues
from ..runtime.paradigm import Paradigm
from .attend import Keys, Selection, attend_dense, attend_gathered
from .layout import Layout, is_aligned, layout_of, n_blocks


class Attend(Protocol):
    """Function that computes the softmax attention over a selection: `attend_dense` or `attend_gathered`."""

    def __call__(self, q: Tensor, selection: Selection, source: Keys, layout: Layout) -> Tensor:
        """Return the output [B T H V]."""
        ...


Rule = Callable[[Sequence[Tensor], Layout, Attend], tuple[Tensor, ...]]
"""Function from tensors of some tokens, [B T ..], first their queries, to tensors of these tokens, first the output."""
Prepare = Callable[[AttentionInputs, KeyValues, Layout], Rule]
"""Function from the keys of a segment to the rule, so that blocks are pooled once for all queries."""


def attend_to_selected(
    x: AttentionInputs, of_queries: Sequence[Tensor], prepare: Prepare, paradigm: Paradigm, block_size: int
) -> tuple[tuple[Tensor, ...], Cache | None]:
    """Apply a rule to a segment; return its outputs and the final cache.

    Parallel: all scores, masked; the definition. Recurrent: the new keys are written to the cache, then each query
    gathers what it chose. Chunkwise: the same in blocks of queries, recomputed in the backward pass.

    Args:
        x: the segment.
        of_queries: further tensors of the queries that the rule reads, [B T ..].
        prepare: makes the rule.
        paradigm: parallel, recurrent or chunkwise.
        block_size: tokens of a block.
    """
    if paradigm is Paradigm.RECURRENT and x.cache is not None and x.output_final_state and x.documents is None:
        final_cache = x.final()
        assert final_cache is not None
        kv = x.key_values_after_write(final_cache)
        return _attend(x, of_queries, kv, prepare, attend_gathered, block_size), final_cache
    results = []
    start = 0
    for part in x.split_documents():
        stop = start + part.q.shape[1]
        queries = [y[:, start:stop] for y in of_queries]
        kv = part.key_values()
        if paradigm is Paradigm.CHUNKWISE:
            results.append(_attend_in_blocks(part, queries, kv, prepare, block_size))
        else:
            attend = attend_dense if paradigm is Paradigm.PARALLEL else attend_gathered
            results.append(_attend(part, queries, kv, prepare, attend, block_size))
        start = stop
    return _concatenate(results), x.final()


def _attend(
    x: AttentionInputs, of_queries: Sequence[Tensor], kv: KeyValues, prepare: Prepare, attend: Attend, block_size: int
) -> tuple[Tensor, ...]:
    """Compute all queries at once."""
    layout = layout_of(x, kv, block_size)
    return prepare(x, kv, layout)((x.q, *of_queries), layout, attend)


def _attend_in_blocks(
    x: AttentionInputs, of_queries: Sequence[Tensor], kv: KeyValues, prepare: Prepare, block_size: int
) -> tuple[Tensor, ...]:
    """Compute the queries in blocks of `chunk_size`, each with the blocks of keys up to its last query."""
    layout = layout_of(x, kv, block_size)
    rule = prepare(x, kv, layout)
    length = x.q.shape[1]
    aligned = is_aligned(x)
    results = []
    for start in range(0, length, x.chunk_size):
        stop = min(start + x.chunk_size, length)
        packed = kv.documents is not None
        blocks = layout.starts.shape[1]
        blocks = blocks if packed else n_blocks(kv.cached + stop, block_size, aligned=aligned)
        args = [y[:, start:stop] for y in (x.q, *of_queries)], layout.part(start, stop, blocks), attend_gathered
        if length > x.chunk_size and torch.is_grad_enabled():
            results.append(checkpoint(rule, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            results.append(rule(*args))
    return _concatenate(results)


def _concatenate(results: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Concatenate the tensors of several blocks of queries."""
    return results[0] if len(results) == 1 else tuple(torch.cat(parts, dim=1) for parts in zip(*results, strict=True))
