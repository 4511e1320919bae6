"""Softmax attention by torch's own scaled dot product attention, in all paradigms (notation of api.py)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from ..autograd import differentiable_once
from .cache import GrowingCache, Offer, final_cache, offer_written
from .call import Attention, AttentionOutput, factored, require_range, visible_keys


def softmax_parallel(x: Attention) -> AttentionOutput:
    """All queries at once, against the cache and the segment's own keys.

    Without cache, window and packing this is one call of SDPA with its own causal mask. Otherwise the mask is explicit:
    a byte per pair.
    """
    require_range(x.log_decay, x.q.shape[1], x.q.dtype)
    return _attend(x, x.offer()), x.final()


def softmax_recurrent(x: Attention) -> AttentionOutput:
    """The cache is written first, then the queries read it: decoding copies nothing but its own token.

    Where a query could need what the cache has evicted by then (several tokens under a window), and where documents are
    packed, the queries read the old cache and the new tokens.
    """
    require_range(x.log_decay, x.q.shape[1], x.q.dtype)
    keeps_all = isinstance(x.cache, GrowingCache) or x.window is None or x.q.shape[1] == 1
    if x.cache is not None and x.output_final_state and x.documents is None and keeps_all:
        final_state = final_cache(x.k, x.v, x.window, x.cache, None)
        return _attend(x, offer_written(final_state, x.cache.length, x.k)), final_state
    return _attend(x, x.offer()), x.final()


def softmax_chunkwise(x: Attention) -> AttentionOutput:
    """Queries in blocks of C, each against the keys from its window's start to its own end.

    Time is quadratic in T, and linear under a window. Memory is linear in T, forward and backward: one block's mask and
    decayed keys at a time, recomputed in the backward pass (a third more work than storing them). The loop over blocks
    is a Python loop, which a compiler unrolls for every T: T / C copies of a few operations. With packed documents
    every block reads every document's cache.
    """
    require_range(x.log_decay, min(x.chunk_size, x.q.shape[1]), x.q.dtype)
    return attend_in_blocks(x, x.chunk_size), x.final()


def attend_in_blocks(x: Attention, size: int, start: int = 0) -> Float[Tensor, "B T H V"]:
    """Queries at the places start, start + 1, ... read in blocks, whose masks are recomputed in the backward pass."""
    offer, outputs = x.offer(), []
    for at in range(0, x.q.shape[1], size):
        block = x._replace(q=x.q[:, at : at + size])
        first, last = start + at, start + at + block.q.shape[1]
        read = offer.up_to(first, last, x.window)
        if x.q.shape[1] > size and torch.is_grad_enabled():
            outputs.append(checkpoint(_attend, block, read, first, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend(block, read, first))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attend(x: Attention, offer: Offer, start: int = 0) -> Float[Tensor, "B T H V"]:
    """Queries at the places start, start + 1, ... read an offer."""
    length, window, values = x.q.shape[1], x.window, offer.values
    q, keys = factored(x.q, start, offer, x.log_decay)
    places = torch.arange(start, start + length, device=q.device)
    plain = offer.cached == 0 and offer.documents is None and start == 0 and (window is None or window >= length)
    mask = None if plain else visible_keys(places, offer, window)
    output = scaled_dot_product_attention(
        q.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=x.scale,
        enable_gqa=q.shape[2] != keys.shape[2],
    )
    # its fused kernels have none, and torch's own error names what nobody has called
    output = differentiable_once("softmax attention", output, "ScaledDotProduct")
    return output.transpose(1, 2).to(x.q.dtype)
