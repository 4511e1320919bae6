"""The parallel kernel of the decay family: o = scale ((q k^T * D) v + (q * p) S_0), quadratic in T.

Notation of api.py; D and p as in chunkwise.py, with all tokens as one chunk.
"""

import torch
from torch import Tensor

from ..recurrence.family import Recurrence, RecurrenceOutput
from ..recurrence.token_loop import no_autocast
from ..runtime.packing import document_of_token

MAX_PAIR_DECAYS = 2**20
"""Maximum number of pair decays (pairs of tokens times key dimensions) that are computed at once.

Beyond it, key dimensions are computed one after another."""


def decay_parallel(x: Recurrence) -> RecurrenceOutput:
    """Compute the recurrence by plain operations, which support forward-mode and second derivatives."""
    x = x.by_head()
    if x.wide_output:  # products in 16 bits could overflow
        x = x.widened()
    q = x.q
    k = x.k
    v = x.v
    log_decay = x.log_decay
    initial_state = x.initial_state
    cu_seqlens = x.cu_seqlens
    length = q.shape[1]
    wide = x.wide_dtype
    token = torch.arange(length, device=q.device)
    causal = token[:, None] >= token
    if cu_seqlens is None:
        document = torch.zeros_like(token)
    else:
        document = document_of_token(cu_seqlens, length)
        causal = causal & (document[:, None] == document)
    # products of q, k and v have the dtype of the inputs, as in other kernels; decays and states stay wide
    with no_autocast(q.device):
        q, k, v = ((q if x.scale == 1 else x.scale * q).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        a = None if log_decay is None else per_token(log_decay.to(wide), length)  # [1|B H T 1|K]
        if log_decay is not None and log_decay.ndim == 1:
            decay = _fixed_decay(log_decay.to(wide), token[:, None] - token, causal)
            scores = ((q @ k.transpose(2, 3)) * decay).to(v.dtype)
        else:
            scores = _pair_scores(q, k, a, causal).to(v.dtype)
        output = (scores @ v).to(wide)
        if initial_state is not None:
            query = q.to(wide)
            state = initial_state.to(wide)
            if a is not None:
                query = query * (a.cumsum(2) if cu_seqlens is None else _sum_where(causal, a)).exp()
            if cu_seqlens is None:
                output = output + query @ state
            else:
                by_document = _one_hot(document, cu_seqlens, wide)
                output = output + torch.einsum("nt,bhtk,nhkv->bhtv", by_document, query, state)
        final_state = None
        if x.output_final_state:
            final_state = _final_state(k.to(wide), v.to(wide), a, initial_state, document, cu_seqlens, causal)
    return RecurrenceOutput(output.to(q.dtype).transpose(1, 2), final_state)


def per_token(a: Tensor, length: int) -> Tensor:
    """Return a log-decay of any allowed shape as [1|B H T 1|K]."""
    if a.ndim == 1:
        return a[None, :, None, None].expand(1, -1, length, 1)
    return (a if a.ndim == 4 else a[..., None]).transpose(1, 2)


def _sum_where(mask: Tensor, a: Tensor) -> Tensor:
    """Return masked sums, out[i] = sum of a[l] over l with mask[i, l]: [I L], [.. L K] -> [.. I K]."""
    sums = [torch.where(mask, part[..., None, :], 0).sum(-1) for part in _split_keys(len(mask), a.mT)]
    return torch.cat(sums, dim=-2).mT


def _split_keys(rows: int, a: Tensor) -> tuple[Tensor, ...]:
    """Split log-decays [.. K L] into single key dimensions if they have more than MAX_PAIR_DECAYS pairs with `rows`."""
    return a.split(a.shape[-2] if rows * a.shape[-1] * a.shape[-2] <= MAX_PAIR_DECAYS else 1, dim=-2)


def _fixed_decay(log_decay: Tensor, distance: Tensor, causal: Tensor) -> Tensor:
    """Return D_ij = gamma^(i - j) where token i sees token j, else 0: [H T T]."""
    exponent = torch.where(distance == 0, 0, distance * log_decay[:, None, None])  # 0 * -inf is nan
    return exponent.masked_fill(~causal, float("-inf")).exp()


def _pair_scores(q: Tensor, k: Tensor, a: Tensor | None, causal: Tensor) -> Tensor:
    """Return the scores q_i k_j^T times the decay from j to i: [B H T T]."""
    if a is None:
        return (q @ k.transpose(2, 3)).masked_fill(~causal, 0)
    if a.shape[-1] == 1:
        return (q @ k.transpose(2, 3)) * _pair_decays(a.mT, causal)[:, :, 0]
    parts = _split_keys(len(causal), a.mT)
    q, k = q.to(a.dtype), k.to(a.dtype)
    if len(parts) == 1:
        return torch.einsum("bhik,bhjk,bhkij->bhij", q, k, _pair_decays(parts[0], causal))
    scores = q.new_zeros(())
    for query, key, part in zip(q.unbind(-1), k.unbind(-1), parts, strict=True):
        scores = scores + query[..., :, None] * key[..., None, :] * _pair_decays(part, causal)[:, :, 0]
    return scores


def _pair_decays(a: Tensor, causal: Tensor) -> Tensor:
    """Return the decay from j to i per key dimension, 0 where i does not see j: [1|B H 1|K T] -> [1|B H 1|K T T]."""
    # entry [j, i] adds up a[l] for j < l <= i, along the contiguous axis
    sums = a[..., None, :].expand(*a.shape, a.shape[-1]).triu(1).cumsum_(-1)
    return sums.masked_fill_(~causal.mT, float("-inf")).exp_().mT


def _one_hot(document: Tensor, cu_seqlens: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a matrix [N T] that is one where the token belongs to the document, else zero."""
    return (torch.arange(len(cu_seqlens) - 1, device=document.device)[:, None] == document).to(dtype)


def _final_state(
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    initial_state: Tensor | None,
    document: Tensor,
    cu_seqlens: Tensor | None,
    causal: Tensor,
) -> Tensor:
    if a is not None and cu_seqlens is None:  # summed from the end, so that the sums of late tokens have few terms
        later = torch.nn.functional.pad(a[:, :, 1:], (0, 0, 0, 1))
        k = k * later.flip(2).cumsum(2).flip(2).exp()
    elif a is not None:
        after = causal.T & ~torch.eye(len(document), dtype=torch.bool, device=k.device)
        k = k * _sum_where(after, a).exp()
    if cu_seqlens is None:
        state = k.transpose(2, 3) @ v
        if initial_state is not None:
            decayed = initial_state.to(k.dtype)
            state = state + (decayed if a is None else decayed * a.sum(2)[..., None].exp())
        return state
    by_document = _one_hot(document, cu_seqlens, k.dtype)
    state = torch.einsum("nt,bhtk,bhtv->nhkv", by_document, k, v)
    if initial_state is not None:
        decayed = initial_state.to(k.dtype)
        if a is not None:
            total = _sum_where(by_document.bool(), a)[0].transpose(0, 1)  # [N H 1|K]
            decayed = decayed * total[..., None].exp()
        state = state + decayed
    return state
