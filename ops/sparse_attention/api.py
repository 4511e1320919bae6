"""Selection of keys: softmax attention of each query over the blocks or tokens that score best.

Notation: B batch, T tokens, H query heads, G key heads, K key width, V value width, M slots of cache and segment, P
blocks of L tokens, R choosers (query heads, key heads, or one for all heads), n keys that a query reads.

    moba     own block, and the topk - 1 best earlier ones by q . mean(k)       by query head; arXiv 2502.13189
    nsa      gated sum of three: means of complete blocks; the topk best blocks by the weights of these means, with
             the first, the own and the previous one; the last w tokens         by key head; arXiv 2502.11089
    dsa      the topk best tokens by an indexer of its own                      one for all heads; arXiv 2512.02556

All three choose by one function (scores.py), and attend to what was chosen by one function (attend.py). Blocks begin at
the first token of a document. The state is the KV cache of softmax attention; the open block is a part of it. Means of
blocks are not stored: every call computes them from the cached keys, by additions alone.
"""

from functools import partial
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from ...registry import SeqmixError
from ..attention.inputs import AttentionInputs, require_attention
from ..attention.kv_cache import Cache
from ..runtime.call import Call, CallOptions
from ..runtime.paradigm import Paradigm
from ..runtime.recording import record
from .blocks import native_sparse_rule, select_own_and_topk
from .layout import n_blocks
from .segments import attend_to_selected
from .tokens import Index, StoredKeys, index_rule


def block_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    call: Call | None = None,
    *,
    block_size: int,
    topk: int,
    scale: float | None = None,
    **options: Unpack[CallOptions],
) -> tuple[Float[Tensor, "B T H V"], Cache | None]:
    """Attend to the own block and to the topk - 1 best earlier ones (MoBA); parallel by default.

    Args:
        q: queries.
        k: keys.
        v: values.
        call: the mixer's call; None if you call the op directly, with `CallOptions`.
        block_size: tokens of a block.
        topk: blocks that a query reads, its own included.
        scale: number that query-key products are multiplied by; 1/sqrt(K) by default.
        options: `CallOptions`.
    """
    call = _resolve(call, q, options)
    x = _inputs(q, k, v, call, scale)
    _require_positive(block_size=block_size, topk=topk)
    rule = partial(select_own_and_topk, block_size=block_size, topk=topk)
    (output,), final_state = attend_to_selected(x, (), rule, call.paradigm, block_size)
    record("softmax", v, None, output)
    return output, final_state


def native_sparse_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    gates: Float[Tensor, "B T H 3"],
    call: Call | None = None,
    *,
    block_size: int,
    topk: int,
    window: int,
    scale: float | None = None,
    **options: Unpack[CallOptions],
) -> tuple[Float[Tensor, "B T H V"], Cache | None]:
    """Return the gated sum of attention to pooled blocks, to the best blocks and to recent tokens (NSA).

    Query heads that share a key head share their selection. Parallel by default.

    Args:
        q: queries.
        k: keys.
        v: values.
        gates: factors of the three branches: pooled blocks, chosen blocks, window.
        call: the mixer's call; None if you call the op directly, with `CallOptions`.
        block_size: tokens of a block.
        topk: blocks that a query reads; its own, the first and the previous one are always among them, in this order
            if topk is below 3.
        window: tokens that the third branch reads, the query's own included.
        scale: number that query-key products are multiplied by; 1/sqrt(K) by default.
        options: `CallOptions`.
    """
    call = _resolve(call, q, options)
    x = _inputs(q, k, v, call, scale)
    _require_positive(block_size=block_size, topk=topk, window=window)
    if gates.shape != (*q.shape[:3], 3):
        raise SeqmixError(f"gates must have the shape {[*q.shape[:3], 3]}, got {list(gates.shape)}")
    rule = partial(native_sparse_rule, block_size=block_size, topk=topk, window=window)
    (output,), final_state = attend_to_selected(x, (gates,), rule, call.paradigm, block_size)
    record("softmax", v, None, output)
    return output, final_state


def index_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    index: Index,
    call: Call | None = None,
    *,
    topk: int,
    scale: float | None = None,
    value_dims: int | None = None,
    **options: Unpack[CallOptions],
) -> tuple[Float[Tensor, "B T H V"], Cache | None] | tuple[Float[Tensor, "B T H V"], Cache | None, Float[Tensor, ""]]:
    """Attend to the tokens that an indexer chooses, the same for all heads (DSA); parallel by default.

    The state is a KV cache of one head: its keys are those of all heads and the index key, side by side, its values
    those of all heads.

    Args:
        q: queries.
        k: keys.
        v: values; empty, [B T G 0], with `value_dims`.
        index: queries, keys and weights of the indexer.
        call: the mixer's call; None if you call the op directly, with `CallOptions`.
        topk: tokens that a query reads.
        scale: number that query-key products are multiplied by; 1/sqrt(K) by default.
        value_dims: number of leading key dimensions that are the values; None if v has them.
        options: `CallOptions`.

    Returns:
        The output [B T H V] and the cache (None unless requested); with `call.return_loss`, then the loss of the
        indexer, summed over the tokens.
    """
    call = _resolve(call, q, options)
    _require_positive(topk=topk)
    _require_index(index, q)
    x = _inputs(q, k, v, call._replace(state=None), scale)
    stored = StoredKeys(k.shape[2], k.shape[3], value_dims)
    keys = torch.cat((k.flatten(2), index.k), dim=-1)[:, :, None]
    x = x._replace(k=keys, v=v.flatten(2)[:, :, None], cache=call.state)
    rule = partial(index_rule, stored=stored, topk=topk, with_loss=call.return_loss)
    results, final_state = attend_to_selected(x, (index.q, index.weights), rule, call.paradigm, 1)
    record("softmax", v, None, results[0])
    if call.return_loss:
        return results[0], final_state, results[1].sum()
    return results[0], final_state


def sparse_flops(
    paradigm: Paradigm,
    length: int,
    *,
    block_size: int,
    chunk_size: int,
    context: int,
    per_pair: int,
    per_block: int,
    topk: int,
    window: int = 0,
) -> int:
    """Return the FLOPs of one query head's matrix products in the forward pass, as each paradigm computes them.

    Args:
        paradigm: parallel, recurrent or chunkwise.
        length: tokens of the segment.
        block_size: tokens of a block.
        chunk_size: queries per block of the chunkwise paradigm.
        context: tokens read before the segment, all of them in a growing cache.
        per_pair: products of numbers per query and key that it reads.
        per_block: products of numbers per query and block that it scores, with one score or more.
        topk: blocks that a query reads.
        window: further keys that a query reads.
    """
    size = chunk_size if paradigm is Paradigm.CHUNKWISE else length
    slots = context + length
    total = 0
    for start in range(0, length, size):
        queries = min(size, length - start)
        blocks = n_blocks(context + start + queries, block_size, aligned=context == 0)
        chosen = min(topk, blocks)
        read = slots * (1 + (window > 0)) if paradigm is Paradigm.PARALLEL else chosen * block_size + min(window, slots)
        total += 2 * queries * (blocks * per_block + read * per_pair)
    return total


def _resolve(call: Call | None, q: Tensor, options: CallOptions) -> Call:
    """Return the mixer's call, or that of an op that is called directly."""
    return Call.resolve(call, q.shape[1], options, op="sparse_attention", paradigm=Paradigm.PARALLEL)


def _inputs(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float | None) -> AttentionInputs:
    """Return the inputs of softmax attention, after checking them."""
    x = AttentionInputs(
        q,
        k,
        v,
        q.shape[-1] ** -0.5 if scale is None else scale,
        call.state,
        call.documents,
        call.return_state,
        call.chunk_size,
        donated=call.donated,
    )
    require_attention(x)
    return x


def _require_positive(**numbers: int) -> None:
    """Raise a SeqmixError for a number below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise SeqmixError(f"{name} must be at least 1, got {number}")


def _require_index(index: Index, q: Tensor) -> None:
    """Raise a SeqmixError for tensors of an indexer that do not fit each other or the queries."""
    shapes = [list(tensor.shape) for tensor in index]
    heads, width = index.q.shape[2:]
    expected = [[*q.shape[:2], heads, width], [*q.shape[:2], width], [*q.shape[:2], heads]]
    if shapes != expected:
        raise SeqmixError(
            f"index expects q [B T I D], k [B T D] and weights [B T I], got {', '.join(map(str, shapes))}"
        )
