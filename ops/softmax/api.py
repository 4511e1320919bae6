"""Softmax attention: every query reads the keys up to its own, weighted by the softmax of their products.

Notation: B batch, T tokens, H query heads, G key heads (head h reads key head h // (H / G)), K key width, V value
width, S slots of a cache, N packed documents, C chunk; n a query's position, m a key's, w the window, a = log_decay.

    s_nm = scale * sum_d q_nd k_md exp(a_d (n - m))          a None means 0; xPos has a decay a pair of dimensions
    o_n  = sum_m softmax_m(s_nm) v_m                         over the keys  max(0, n - w + 1) <= m <= n

A window of w means that a query sees w keys, its own included. The state is a cache of keys and values, and rows of a
batch may have read different numbers of tokens: what a query sees is decided by the positions that slots hold.

The decay of a pair is a product of two factors relative to a reference r, the middle of the queries at hand:

    exp(a (n - r)) * exp(-a (m - r))         keys far before r underflow to 0, which is their limit

Keys are cached without their factor, so no factor ever depends on an absolute position.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from ...registry import SeqmixError
from ..context_parallel import Context
from ..kernels import Kernel, chosen, declare, require_floats
from ..packing import require_async, require_borders
from ..paradigm import Paradigm
from .cache import Cache, GrowingCache, Offer, final_cache, first_key, offer_of, offer_written

Backend = Literal["auto", "sdpa", "flex", "xformers"]
"""Whose kernels: `auto` is settled when a model is built; `sdpa` and `flex` are torch's."""


def softmax_parallel(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    *,
    scale: float | None = None,
    window: int | None = None,
    log_decay: Float[Tensor, " K"] | None = None,
    initial_state: Cache | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Cache | None]:
    """All queries at once, against the cache and the segment's own keys.

    Without cache, window and packing this is one call of SDPA with its own causal mask. Otherwise the mask is explicit:
    a byte a pair. Arguments and result are those of `softmax_chunkwise`.
    """
    scale = require_inputs(q, k, v, scale, window, log_decay, initial_state, cu_seqlens)
    require_range(log_decay, q.shape[1], q.dtype)
    offer = offer_of(k, v, initial_state, cu_seqlens)
    output = _attend(q, 0, offer, scale, window, log_decay)
    return output, final_cache(k, v, window, initial_state, cu_seqlens) if output_final_state else None


def softmax_recurrent(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    *,
    scale: float | None = None,
    window: int | None = None,
    log_decay: Float[Tensor, " K"] | None = None,
    initial_state: Cache | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Cache | None]:
    """The cache is written first, then the queries read it: decoding copies nothing but its own token.

    Where a query could need what the cache has dropped by then (several tokens under a window), and where documents are
    packed, the queries read the old cache and the new tokens. Arguments and result are those of `softmax_chunkwise`.
    """
    scale = require_inputs(q, k, v, scale, window, log_decay, initial_state, cu_seqlens)
    require_range(log_decay, q.shape[1], q.dtype)
    keeps_all = isinstance(initial_state, GrowingCache) or window is None or q.shape[1] == 1
    if initial_state is not None and output_final_state and cu_seqlens is None and keeps_all:
        final_state = final_cache(k, v, window, initial_state, None)
        offer = offer_written(final_state, initial_state.length, k)
        return _attend(q, 0, offer, scale, window, log_decay), final_state
    offer = offer_of(k, v, initial_state, cu_seqlens)
    output = _attend(q, 0, offer, scale, window, log_decay)
    return output, final_cache(k, v, window, initial_state, cu_seqlens) if output_final_state else None


def softmax_chunkwise(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    *,
    scale: float | None = None,
    window: int | None = None,
    log_decay: Float[Tensor, " K"] | None = None,
    initial_state: Cache | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
    chunk_size: int = 512,
) -> tuple[Float[Tensor, "B T H V"], Cache | None]:
    """Queries in blocks of C, each against the keys from its window's start to its own end.

    Time is quadratic in T, and linear under a window. Memory is linear in T, forward and backward: one block's mask and
    decayed keys at a time, recomputed in the backward pass (a third more work than storing them). The loop over blocks
    is a Python loop, which a compiler unrolls anew for every T: T / C copies of a few operations. With packed documents
    every block reads every document's cache.

    Args:
        q: queries.
        k: keys.
        v: values.
        scale: factor of the scores, 1/sqrt(K) by default.
        window: keys that a query sees, its own included; None means all.
        log_decay: natural log of what a token of distance does to each dimension's product, <= 0.
        initial_state: what was read before; None means nothing. A `RingCache` is written in place if a final state is
            wanted and grad mode is off, except with packed documents; a state is never written in grad mode.
        output_final_state: whether the cache after the last token is wanted. It is of the kind of the initial state;
            without one, a ring of `window` slots under a window, else a growing cache.
        cu_seqlens: borders of N documents packed into one row (B = 1); states then have N rows. Empty ones are legal.
        chunk_size: queries a block; changes the cost, never the result.

    Returns:
        The output in the dtype of q, and the final state or None.

    Raises:
        SeqmixError: shapes, dtypes or the documents' borders do not fit, said in one sentence.
        RuntimeError: what only tensors know does not fit, raised in the device's own time: a ring that would drop keys
            which later queries see, a decay whose factors would leave the dtype's range; on a GPU and in compiled code
            the borders too.
    """
    scale = require_inputs(q, k, v, scale, window, log_decay, initial_state, cu_seqlens)
    if chunk_size < 1:
        raise SeqmixError(f"chunk_size must be at least 1, and is {chunk_size}")
    length = q.shape[1]
    require_range(log_decay, min(chunk_size, length), q.dtype)
    offer = offer_of(k, v, initial_state, cu_seqlens)
    output = _attend_in_blocks(q, 0, offer, scale, window, log_decay, chunk_size)
    return output, final_cache(k, v, window, initial_state, cu_seqlens) if output_final_state else None


def softmax(
    paradigm: Paradigm,
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    *,
    scale: float | None = None,
    window: int | None = None,
    log_decay: Float[Tensor, " K"] | None = None,
    initial_state: Cache | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
    chunk_size: int = 512,
    backend: str = "sdpa",
    context: Context | None = None,
) -> tuple[Float[Tensor, "B T H V"], Cache | None]:
    """The map in the paradigm asked for, by a backend's kernel; the chunk size is read by `softmax_chunkwise` alone.

    With a context, tokens are this rank's, borders and states those of the whole row. Every rank gathers all keys and
    values, and SDPA computes it, whatever the backend.
    """
    if context is not None:
        length, start = q.shape[1], context.start(q.shape[1])
        size = chunk_size if paradigm is Paradigm.CHUNKWISE else length
        k, v = context.gather_tokens(k), context.gather_tokens(v)
        scale = require_inputs(q, k, v, scale, window, log_decay, initial_state, cu_seqlens, segments=context.size)
        require_range(log_decay, min(size, length), q.dtype)
        offer = offer_of(k, v, initial_state, cu_seqlens)
        output = _attend_in_blocks(q, start, offer, scale, window, log_decay, size)
        return output, final_cache(k, v, window, initial_state, cu_seqlens) if output_final_state else None
    chunks = {"chunk_size": chunk_size} if paradigm is Paradigm.CHUNKWISE else {}
    return chosen("softmax", paradigm, backend).function(
        q,
        k,
        v,
        scale=scale,
        window=window,
        log_decay=log_decay,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        **chunks,
    )


def softmax_flops(
    paradigm: Paradigm,
    length: int,
    key_dim: int,
    value_dim: int,
    *,
    window: int | None = None,
    chunk_size: int = 512,
    context: int = 0,
) -> int:
    """Operations of one query head's matrix products, forward, as each paradigm computes them (masked pairs count).

    Args:
        paradigm: how it is computed.
        length: tokens of the segment.
        key_dim: K.
        value_dim: V.
        window: keys that a query sees, its own included.
        chunk_size: queries a block.
        context: tokens read before; a growing cache holds them all, under a window a ring has `window` slots.
    """
    cached = 0 if context == 0 else context if window is None else window
    if paradigm is Paradigm.CHUNKWISE:
        starts = range(0, length, chunk_size)
        blocks = [(start, min(start + chunk_size, length)) for start in starts]
        pairs = sum((stop - start) * (cached + stop - first_key(start, cached, window)) for start, stop in blocks)
    elif paradigm is Paradigm.RECURRENT and cached and length == 1 and window is not None:
        pairs = cached  # the token's key is in the ring by then
    else:
        pairs = length * (cached + length)
    return 2 * pairs * (key_dim + value_dim)


def _attend_in_blocks(
    q: Tensor,
    start: int,
    offer: Offer,
    scale: float,
    window: int | None,
    log_decay: Tensor | None,
    size: int,
) -> Float[Tensor, "B T H V"]:
    """Queries at the places start, start + 1, ... read an offer in blocks, whose masks are made anew in backward."""
    outputs = []
    for at in range(0, q.shape[1], size):
        block = q[:, at : at + size]
        first, last = start + at, start + at + block.shape[1]
        read = offer.up_to(first, last, window)
        if q.shape[1] > size and torch.is_grad_enabled():
            arguments = (block, first, read, scale, window, log_decay)
            outputs.append(checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend(block, first, read, scale, window, log_decay))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attend(
    q: Tensor, start: int, offer: Offer, scale: float, window: int | None, log_decay: Tensor | None
) -> Float[Tensor, "B T H V"]:
    """Queries at the places start, start + 1, ... read an offer."""
    length, dtype = q.shape[1], q.dtype
    values = offer.values
    q, keys = factored(q, start, offer, log_decay)
    places = torch.arange(start, start + length, device=q.device)
    plain = offer.cached == 0 and offer.documents is None and start == 0 and (window is None or window >= length)
    mask = None if plain else visible_keys(places, offer, window)
    output = scaled_dot_product_attention(
        q.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != keys.shape[2],
    )
    return output.transpose(1, 2).to(dtype)


def factored(q: Tensor, start: int, offer: Offer, log_decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries at the places start, start + 1, ... and an offer's keys, each with its factor of the decay."""
    if log_decay is None:
        return q, offer.keys
    length = q.shape[1]
    middle = start + length // 2
    places = torch.arange(start, start + length, device=q.device)
    q = _decayed(q, places - middle, log_decay)
    # keys behind the block are seen by none of its queries, and must not overflow
    return q, _decayed(offer.keys, (middle - offer.places).clamp(min=middle - start - length), log_decay)


def _decayed(x: Tensor, distance: Tensor, log_decay: Tensor) -> Tensor:
    """Heads [B T H K] times exp(log_decay * distance), distance [T] or [B T]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = (distance[..., None, None].to(wide) * log_decay.to(wide)).exp()
    return (x.to(wide) * factor).to(x.dtype)


def visible_keys(places: Tensor, offer: Offer, window: int | None) -> Bool[Tensor, "_ 1 T M"]:
    """Which keys each query sees."""
    query, key = places[:, None], offer.places[:, None]
    visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    if offer.documents is not None:
        of_key, of_query = offer.documents
        visible = visible & (of_key == of_query[:, None])
    return visible[:, None]


def require_range(log_decay: Tensor | None, length: int, dtype: torch.dtype) -> None:
    """Refuse a decay that `length` queries at once would turn into factors outside the dtype's range."""
    if log_decay is None:
        return
    # one half of the exponent's range is the factors', the other is left to queries and keys
    lowest = -math.log(torch.finfo(dtype).max) / length
    require_async(
        (log_decay >= lowest).all(),
        f"log_decay is so low that its factors over this many tokens at once leave the range of {dtype}: "
        "use the chunkwise paradigm, or a smaller chunk_size",
    )


def require_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
    log_decay: Tensor | None,
    cache: Cache | None,
    cu_seqlens: Tensor | None,
    segments: int = 1,
) -> float:
    """Refuse what no kernel of the family takes.

    Args:
        q: queries: one of so many equal `segments` of the row that keys and values are of.
        k: keys.
        v: values.
        scale: factor of the scores; None for 1/sqrt(K).
        window: keys that a query sees.
        log_decay: natural log of what a token of distance does.
        cache: what was read before.
        cu_seqlens: borders of packed documents.
        segments: ranks that share the row.

    Returns:
        The scale.

    Raises:
        SeqmixError: shapes, dtypes or borders do not fit.
    """
    require_floats(q, k, v)
    shapes = (q.shape, k.shape, v.shape)
    fit = all(len(shape) == 4 for shape in shapes) and (q.shape[0], q.shape[1] * segments) == k.shape[:2] == v.shape[:2]
    if not fit or q.shape[1] < 1:
        raise SeqmixError(
            "q must be [B T H K], k [B T G K] and v [B T G V] with T >= 1; "
            f"given are {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    n_heads, key_dim = q.shape[2:]
    n_kv_heads = k.shape[2]
    if k.shape[3] != key_dim or v.shape[2] != n_kv_heads or n_heads % n_kv_heads:
        raise SeqmixError(
            "k and v must have the same heads, their number must divide that of q, and k the width of q; "
            f"given are {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if window is not None and window < 1:
        raise SeqmixError(f"a window of {window} keys leaves out the query's own: 1 is the smallest")
    if log_decay is not None and log_decay.shape != (key_dim,):
        raise SeqmixError(f"log_decay is one number a key dimension, [{key_dim}], and is {list(log_decay.shape)}")
    rows = q.shape[0]
    if cu_seqlens is not None:
        if rows != 1:
            raise SeqmixError(f"packed documents are one row (B = 1), and the batch is {rows}")
        rows = cu_seqlens.shape[0] - 1
        require_borders(cu_seqlens, k.shape[1])
    if cache is not None:
        needed = ([rows, n_kv_heads, key_dim], [rows, n_kv_heads, v.shape[3]], [rows])
        given = ([*x.shape[:1], *x.shape[2:]] for x in cache)
        if any(a != b for a, b in zip(needed, given, strict=True)):
            raise SeqmixError(
                f"the cache must have {rows} rows of {n_kv_heads} heads of {key_dim} (keys) and {v.shape[3]} (values); "
                f"its leaves are {', '.join(str(list(x.shape)) for x in cache)}"
            )
    return key_dim**-0.5 if scale is None else scale


# Twice the worst of several thousand cases a function. In blocks, gradients of keys and values in 16 bits are rounded
# once a block: 70 blocks of one query make that tolerance.
TOLERANCES = {torch.float64: 1e-15, torch.float32: 4e-7, torch.bfloat16: 7e-3, torch.float16: 8e-4}

declare(
    Kernel(
        op="softmax",
        paradigm=Paradigm.PARALLEL,
        backend="sdpa",
        function=softmax_parallel,
        tolerances=TOLERANCES,
        reference=True,
    )
)
declare(
    Kernel(
        op="softmax",
        paradigm=Paradigm.RECURRENT,
        backend="sdpa",
        function=softmax_recurrent,
        tolerances=TOLERANCES,
        reference=True,
    )
)
declare(
    Kernel(
        op="softmax",
        paradigm=Paradigm.CHUNKWISE,
        backend="sdpa",
        function=softmax_chunkwise,
        tolerances=TOLERANCES | {torch.bfloat16: 9e-3, torch.float16: 1e-3},
        reference=True,
    )
)
