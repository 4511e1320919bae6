"""Softmax attention with PaTH's positions: products of transformations along the path from key to query (2505.16381).

Notation of api.py, and H_l = I - beta_l w_l w_l^T, one per token and key head.

    s_nm = scale * q_n H_n H_{n-1} .. H_{m+1} k_m + sum_{m < l <= n} log f_l      f: forget gates (FoX), not scaled
    o_n  = sum_{m <= n} softmax_m(s_nm) v_m

The cache has the keys as the next token finds them, H_N .. H_{m+1} k_m after N tokens: every token changes all of them.
So a segment sees cached keys as if they were its own. Per chunk of C tokens, with the keys x_m at its start (or k_m, of
its own tokens) and l, n for its tokens:

    (1 + L) U = beta * (w x^T), where token l comes after key m       L_lj = beta_l w_l . w_j, j < l
    s_nm = scale * (q_n . x_m - sum_{l <= n} (q_n . w_l) U_lm)        x'_m = x_m - sum_l U_lm w_l

U_lm is beta_l times the product of w_l and key m as token l finds it. The parallel paradigm has one chunk, the
recurrent paradigm one token per chunk. Time is quadratic in T, and cubic in the chunk.
"""

from itertools import pairwise
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from ...registry import SeqmixError
from ..recurrence.token_loop import no_autocast
from ..runtime.call import Call, CallOptions
from ..runtime.paradigm import Paradigm
from .inputs import AttentionInputs, AttentionOutput, require_attention, visible_keys
from .kv_cache import Cache, ForgettingCache, KeyValues, final_cache, key_cache
from .scores import group_heads, mask_scores, ungroup_heads


def path_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    w: Float[Tensor, "B T G K"],
    beta: Float[Tensor, "B T G"],
    call: Call | None = None,
    *,
    scale: float | None = None,
    log_forget: Float[Tensor, "B T H"] | None = None,
    **options: Unpack[CallOptions],
) -> AttentionOutput:
    """Compute causal softmax attention with PaTH's positions; chunkwise by default, with chunks of 64 tokens.

    The state is a KV cache with float32 keys (float64 for float64 inputs), a `ForgettingCache` with `log_forget`.

    Args:
        q: queries.
        k: keys.
        v: values.
        w: directions of the transformations, normally of norm 1.
        beta: factors of the transformations, from 0 to 2 for directions of norm 1.
        call: the mixer's call; None if you call the op directly, with `options`.
        scale: number that products of queries and keys are multiplied by; 1/sqrt(K) by default.
        log_forget: natural log of each token's forget gate, <= 0 and finite; None for none.
        options: keywords of a direct call, see `CallOptions`.

    Raises:
        SeqmixError: shapes, dtypes or document boundaries do not match.
        RuntimeError: a ring cache is too small.
    """
    call = Call.resolve(call, q.shape[1], options, op="path_attention", paradigm=Paradigm.CHUNKWISE, chunk_size=64)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    x = AttentionInputs(
        q, k, v, factor, call.state, call.documents, call.return_state, call.chunk_size, log_forget=log_forget
    )
    require_attention(x)
    if w.shape != k.shape or beta.shape != k.shape[:3]:
        raise SeqmixError(
            f"expected w of the shape of k, {list(k.shape)}, and beta of {list(k.shape[:3])}, "
            f"got {list(w.shape)} and {list(beta.shape)}"
        )
    size = {Paradigm.PARALLEL: q.shape[1], Paradigm.RECURRENT: 1}.get(call.paradigm, call.chunk_size)
    with no_autocast(q.device):
        wide = torch.promote_types(q.dtype, torch.float32)
        return _attend_each_document(x._replace(k=k.to(wide)), w.to(wide), beta.to(wide), size)


def _attend_each_document(x: AttentionInputs, w: Tensor, beta: Tensor, size: int) -> AttentionOutput:
    """Compute the attention of each document, or of all tokens if the host does not know the documents' boundaries."""
    if x.documents is None or x.documents.boundaries is None:
        output, past, keys = _attend_in_chunks(x, w, beta, size)
        return output, _final(x, past, keys) if x.output_final_state else None
    parts = iter(x.split_documents())
    outputs, pasts, keys = [], [], []
    for number, (start, stop) in enumerate(pairwise(x.documents.boundaries)):
        if start == stop:  # an empty document keeps its cache
            pasts.append(None if x.cache is None else key_cache(x.cache).keys[number : number + 1])
            continue
        output, past, changed = _attend_in_chunks(next(parts), w[:, start:stop], beta[:, start:stop], size)
        outputs.append(output)
        pasts.append(past)
        keys.append(changed)
    output = torch.cat(outputs, dim=1)
    if not x.output_final_state:
        return output, None
    past = None if x.cache is None else torch.cat(pasts)
    return output, _final(x, past, torch.cat(keys, dim=1))


def _attend_in_chunks(
    x: AttentionInputs, w: Tensor, beta: Tensor, size: int
) -> tuple[Tensor, Float[Tensor, "N S G K"] | None, Float[Tensor, "B T G K"]]:
    """Compute the attention in chunks of `size` tokens, each of which changes the keys of all tokens before it.

    Returns:
        The output, the keys of the cache after the segment (None without a cache), and those of the segment. Keys are
        final only if the final state is requested.
    """
    kv = x.key_values()
    keys = kv.keys[:, : kv.cached]
    length = x.q.shape[1]
    outputs = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        keys = torch.cat((keys, x.k[:, start:stop]), dim=1)
        part = kv.up_to(start, stop, None)._replace(keys=keys)
        output, changes = _attend(x, part, w[:, start:stop], beta[:, start:stop], start)
        outputs.append(output)
        if stop < length or x.output_final_state:
            keys = keys - (changes.mT @ w[:, start:stop].transpose(1, 2)).transpose(1, 2)
    past = x.key_cache
    past_keys = None if past is None else past.keys
    if past_keys is not None and kv.cached:
        past_keys = keys[:, : kv.cached].reshape(past_keys.shape)
    return torch.cat(outputs, dim=1).to(x.q.dtype), past_keys, keys[:, kv.cached :]


def _attend(x: AttentionInputs, kv: KeyValues, w: Tensor, beta: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Return the outputs of a chunk's queries, [B C H V], and U, [B G C M]; `kv` has the keys up to the chunk's end."""
    chunk = w.shape[1]
    groups = w.shape[2]
    places = torch.arange(start, start + chunk, device=w.device)
    visible = visible_keys(places, kv, None)
    later = visible & (kv.places[:, None] < places[:, None])[:, None]  # tokens that change a key
    w, keys = w.transpose(1, 2), kv.keys.transpose(1, 2)
    beta = beta.transpose(1, 2)[..., None]
    system = (beta * (w @ w.mT)).masked_fill(~later[..., -chunk:], 0)
    products = (beta * (w @ keys.mT)).masked_fill(~later, 0)
    changes = torch.linalg.solve_triangular(system, products, upper=False, unitriangular=True)
    q = group_heads(x.q[:, start : start + chunk].transpose(1, 2).to(w.dtype) * x.scale, groups)
    n_heads = x.q.shape[2]
    along = ungroup_heads(q @ w.mT, n_heads).masked_fill(~visible[..., -chunk:], 0)
    scores = ungroup_heads(q @ keys.mT - group_heads(along, groups) @ changes, n_heads)
    weights = mask_scores(x, scores, visible, x.bias(places, kv)).softmax(-1)
    output = group_heads(weights, groups) @ kv.values.transpose(1, 2).to(w.dtype)
    return ungroup_heads(output, n_heads).transpose(1, 2), changes


def _final(x: AttentionInputs, past: Float[Tensor, "N S G K"] | None, keys: Float[Tensor, "B T G K"]) -> Cache:
    """Return the cache after the segment; `past` and `keys` are those that its last token leaves."""
    cache = x.cache
    if cache is not None and past is not None:
        # a copy, because a ring is written in place
        changed = key_cache(cache)._replace(keys=past.clone())
        cache = cache._replace(cache=changed) if isinstance(cache, ForgettingCache) else changed
    final = final_cache(keys, x.v, None, cache, x.documents, x.log_forget)
    if cache is not None:
        return final
    values = key_cache(final).values.to(x.v.dtype)  # the new cache has the dtype of the keys
    final_keys = key_cache(final)._replace(values=values)
    return final._replace(cache=final_keys) if isinstance(final, ForgettingCache) else final_keys


def path_flops(
    paradigm: Paradigm,
    length: int,
    heads: tuple[int, int],
    key_dim: int,
    value_dim: int,
    *,
    chunk_size: int = 64,
    context: int = 0,
) -> int:
    """Return the FLOPs of the matrix products in the forward pass, without those of the triangular solves.

    Args:
        paradigm: parallel, recurrent or chunkwise.
        length: tokens of the segment.
        heads: number of query heads, and of key heads.
        key_dim: K.
        value_dim: V.
        chunk_size: chunk length in tokens of the chunkwise paradigm.
        context: tokens before the segment, all of them in the cache.
    """
    n_heads, groups = heads
    size = {Paradigm.PARALLEL: length, Paradigm.RECURRENT: 1}.get(paradigm, chunk_size)
    flops = 0
    for start in range(0, length, size):
        stop = min(start + size, length)
        chunk = stop - start
        keys = context + stop
        per_key_head = chunk * key_dim * (chunk + keys * (1 if stop == length else 2))
        per_head = chunk * (keys * (key_dim + value_dim + chunk) + chunk * key_dim)
        flops += 2 * (groups * per_key_head + n_heads * per_head)
    return flops
