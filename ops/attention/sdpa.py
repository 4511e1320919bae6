"""Softmax attention by torch's own scaled dot product attention, in all paradigms (notation of api.py)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from ..recurrence.token_loop import no_autocast
from ..runtime.custom_op import differentiable_once
from .inputs import AttentionInputs, AttentionOutput, factored, require_range, visible_keys
from .kv_cache import GrowingCache, Offer
from .scores import needs_weights, weighed


def softmax_parallel(x: AttentionInputs) -> AttentionOutput:
    """All queries at once, against the cache and the segment's own keys.

    Without cache, window and packing this is one call of SDPA with its own causal mask. Otherwise the mask is explicit:
    a byte per pair, a float under gates or slopes. Documents whose boundaries the host knows are read one by one.
    """
    return _each(x, _at_once), x.final()


def softmax_recurrent(x: AttentionInputs) -> AttentionOutput:
    """The cache is written first, then the queries read it: decoding copies nothing but its own token.

    Where a query could need what the cache has evicted by then (several tokens under a window), and where documents are
    packed, the queries read the old cache and the new tokens.
    """
    keeps_all = isinstance(x.kept, GrowingCache) or x.window is None or x.q.shape[1] == 1
    if x.cache is not None and x.output_final_state and x.documents is None and keeps_all:
        require_range(x.log_decay, x.q.shape[1], x.q.dtype)
        final_state = x.final()
        assert final_state is not None
        return _attend(x, x.written(final_state)), final_state
    return _each(x, _at_once), x.final()


def softmax_chunkwise(x: AttentionInputs) -> AttentionOutput:
    """Queries in blocks of C, each against the keys from its window's start to its own end.

    Time is quadratic in T, and linear under a window. Memory is linear in T, forward and backward: one block's mask and
    decayed keys at a time, recomputed in the backward pass (a third more work than storing them). The loop over blocks
    is a Python loop, which a compiler unrolls for every T: T / C copies of a few operations. With packed documents
    whose boundaries only the device knows, every block reads every document's cache.
    """

    def in_blocks(part: AttentionInputs) -> Tensor:
        require_range(x.log_decay, min(x.chunk_size, part.q.shape[1]), x.q.dtype)
        return attend_in_blocks(part, x.chunk_size)

    return _each(x, in_blocks), x.final()


def _each(x: AttentionInputs, attend: Callable[[AttentionInputs], Tensor]) -> Float[Tensor, "B T H V"]:
    """Document by document, where their boundaries are known."""
    outputs = [attend(part) for part in x.by_document()]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _at_once(x: AttentionInputs) -> Float[Tensor, "B T H V"]:
    require_range(x.log_decay, x.q.shape[1], x.q.dtype)
    return _attend(x, x.offer())


def attend_in_blocks(x: AttentionInputs, size: int, start: int = 0) -> Float[Tensor, "B T H V"]:
    """Queries at the places start, start + 1, ... read in blocks, whose masks are recomputed in the backward pass."""
    offer = x.offer()
    outputs = []
    for at in range(0, x.q.shape[1], size):
        block = x._replace(q=x.q[:, at : at + size])
        first = start + at
        last = start + at + block.q.shape[1]
        read = offer.up_to(first, last, x.window)
        if x.q.shape[1] > size and torch.is_grad_enabled():
            outputs.append(checkpoint(_attend, block, read, first, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend(block, read, first))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attend(x: AttentionInputs, offer: Offer, start: int = 0) -> Float[Tensor, "B T H V"]:
    """Queries at the places start, start + 1, ... read an offer."""
    length = x.q.shape[1]
    window = x.window
    q, keys = factored(x.q, start, offer, x.log_decay)
    places = torch.arange(start, start + length, device=q.device)
    whole = offer.cached == 0 and offer.documents is None and start == 0 and (window is None or window >= length)
    if whole and not x.scores:
        return _fused(q, keys, offer.values, x.scale, None)
    seen = visible_keys(places, offer, window)
    bias = x.bias(places, offer)
    if needs_weights(x, bias):
        return weighed(x, q, keys, offer.values, seen, bias)
    with no_autocast(q.device):  # it would narrow the bias
        return _fused(q, keys, offer.values, x.scale, seen if bias is None else bias.masked_fill_(~seen, -torch.inf))


def _fused(q: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None) -> Float[Tensor, "B T H V"]:
    """One call of SDPA, causal without a mask."""
    n_heads = q.shape[2]
    groups = keys.shape[2]
    if q.shape[1] == 1 and groups < n_heads:  # the heads that share a key are its queries, or it would be copied
        rows = q.reshape(q.shape[0], groups, -1, q.shape[3]).transpose(1, 2)
        if mask is None:
            mask = q.new_ones(1, 1, 1, keys.shape[1], dtype=torch.bool)
        elif mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], groups, -1, mask.shape[3])
        return _fused(rows, keys, values, scale, mask).transpose(1, 2).reshape(*q.shape[:3], values.shape[3])
    output = scaled_dot_product_attention(
        q.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=n_heads != groups,
    )
    # its fused kernels have none, and torch's own error names what nobody has called
    output = differentiable_once("softmax attention", output, "ScaledDotProduct")
    return output.transpose(1, 2).to(q.dtype)
