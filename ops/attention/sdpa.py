"""Softmax attention through torch's scaled_dot_product_attention (SDPA), in all paradigms (notation of api.py)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from ..recurrence.token_loop import no_autocast
from ..runtime.custom_op import differentiable_once
from .inputs import AttentionInputs, AttentionOutput, apply_decay, require_range, visible_keys
from .kv_cache import GrowingCache, KeyValues
from .scores import attend_by_scores, needs_weights


def softmax_parallel(x: AttentionInputs) -> AttentionOutput:
    """Compute the attention of all queries at once, over the cache and the segment's own keys.

    Without cache, window and packing, this is one call of SDPA with its built-in causal mask. Otherwise the mask is
    explicit: one byte per pair, or one float with gates or slopes. Documents whose boundaries are on the host are
    computed one by one.
    """
    return _attend_each_document(x, _attend_at_once), x.final()


def softmax_recurrent(x: AttentionInputs) -> AttentionOutput:
    """Write the new keys to the cache, then compute the attention over it: a decoding step copies only its own token.

    With several tokens under a window, writing could evict keys that the first queries still see. In that case, and
    with packed documents, the queries use the initial cache and the new tokens side by side.
    """
    keeps_all = isinstance(x.key_cache, GrowingCache) or x.window is None or x.q.shape[1] == 1
    if x.cache is not None and x.output_final_state and x.documents is None and keeps_all:
        require_range(x.log_decay, x.q.shape[1], x.q.dtype)
        final_cache = x.final()
        assert final_cache is not None
        return _attend(x, x.key_values_after_write(final_cache)), final_cache
    return _attend_each_document(x, _attend_at_once), x.final()


def softmax_chunkwise(x: AttentionInputs) -> AttentionOutput:
    """Compute the attention in blocks of C queries, each over the keys from the start of its window to its last query.

    Time is quadratic in T, or linear with a window. Memory is linear in T, forward and backward: masks and decayed keys
    exist for one block at a time and are recomputed in the backward pass, for a third more work. The loop over blocks
    is a Python loop, which a compiler unrolls for every T into T / C copies. If the boundaries of packed documents are
    only on the device, every block reads every document's cache.
    """

    def attend(part: AttentionInputs) -> Tensor:
        require_range(x.log_decay, min(x.chunk_size, part.q.shape[1]), x.q.dtype)
        return attend_in_blocks(part, x.chunk_size)

    return _attend_each_document(x, attend), x.final()


def _attend_each_document(x: AttentionInputs, attend: Callable[[AttentionInputs], Tensor]) -> Float[Tensor, "B T H V"]:
    """Apply `attend` to each document, or to all tokens if the host does not know the documents' boundaries."""
    outputs = [attend(part) for part in x.split_documents()]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attend_at_once(x: AttentionInputs) -> Float[Tensor, "B T H V"]:
    require_range(x.log_decay, x.q.shape[1], x.q.dtype)
    return _attend(x, x.key_values())


def attend_in_blocks(x: AttentionInputs, size: int, start: int = 0) -> Float[Tensor, "B T H V"]:
    """Compute the attention of queries at the places start, start + 1, ... in blocks of `size` queries.

    Masks are recomputed in the backward pass. Where torch has a fused kernel for the whole segment, whose memory is
    linear in T too, one call is faster.
    """
    kv = x.key_values()
    if x.q.shape[1] > size and start == 0 and _is_fused(x, kv):
        return _attend(x, kv)
    outputs = []
    for offset in range(0, x.q.shape[1], size):
        block = x._replace(q=x.q[:, offset : offset + size])
        first = start + offset
        stop = first + block.q.shape[1]
        block_kv = kv.up_to(first, stop, x.window)
        if x.q.shape[1] > size and torch.is_grad_enabled():
            outputs.append(checkpoint(_attend, block, block_kv, first, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend(block, block_kv, first))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _is_plain_causal(x: AttentionInputs, kv: KeyValues) -> bool:
    """True if SDPA's built-in causal mask is the mask of a segment from place 0 on."""
    length = x.q.shape[1]
    return kv.cached == 0 and kv.documents is None and not x.scores and (x.window is None or x.window >= length)


def _is_fused(x: AttentionInputs, kv: KeyValues) -> bool:
    """True if torch computes the whole segment by a fused kernel, which forms no matrix of scores."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or x.q.device.type == "meta":
        return False
    if x.log_decay is not None or not _is_plain_causal(x, kv):
        return False
    q, k, v = (y.transpose(1, 2) for y in (x.q, kv.keys, kv.values))
    is_grouped = q.shape[1] != k.shape[1]
    choice = torch.ops.aten._fused_sdp_choice(q, k, v, None, 0.0, True, scale=x.scale, enable_gqa=is_grouped)
    return choice != MATH


MATH = 0
"""Number of SDPA's kernel that forms all scores."""


def _attend(x: AttentionInputs, kv: KeyValues, start: int = 0) -> Float[Tensor, "B T H V"]:
    """Compute the attention of queries at the places start, start + 1, ... over keys and values."""
    q, keys = apply_decay(x.q, start, kv, x.log_decay)
    if start == 0 and _is_plain_causal(x, kv):
        return _sdpa(q, keys, kv.values, x.scale, None)
    places = torch.arange(start, start + x.q.shape[1], device=q.device)
    visible = visible_keys(places, kv, x.window)
    bias = x.bias(places, kv)
    if needs_weights(x, bias):
        return attend_by_scores(x, q, keys, kv.values, visible, bias)
    mask = visible if bias is None else bias.masked_fill_(~visible, -torch.inf)
    with no_autocast(q.device):  # autocast would round the bias to 16 bits
        return _sdpa(q, keys, kv.values, x.scale, mask)


def _sdpa(q: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None) -> Float[Tensor, "B T H V"]:
    """Call SDPA once; without a mask it is causal."""
    n_heads = q.shape[2]
    groups = keys.shape[2]
    if q.shape[1] == 1 and groups < n_heads:  # heads that share a key become queries of it, which avoids copies of keys
        rows = q.reshape(q.shape[0], groups, -1, q.shape[3]).transpose(1, 2)
        if mask is None:
            mask = q.new_ones(1, 1, 1, keys.shape[1], dtype=torch.bool)
        elif mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], groups, -1, mask.shape[3])
        return _sdpa(rows, keys, values, scale, mask).transpose(1, 2).reshape(*q.shape[:3], values.shape[3])
    output = scaled_dot_product_attention(
        q.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=n_heads != groups,
    )
    # fused kernels have no second derivative, and torch's own error would name an internal function
    output = differentiable_once("softmax attention", output, "ScaledDotProduct")
    return output.transpose(1, 2).to(q.dtype)
