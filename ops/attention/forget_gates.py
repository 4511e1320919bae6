"""Forget gates of keys (Forgetting Transformer, arXiv 2503.02130; notation of api.py).

    s_nm += sum_{m < l <= n} log f_l = c_n - c_m          c_n = sum_{l <= n} log f_l, per query head

Only differences of sums are used, so the sums may begin at any token. They are float64: c grows with the length of the
sequence, and in float32 the difference of two large sums has lost the gates of a few tokens. A cache stores gates, not
sums (`ForgettingCache`); this module adds them up from the last token back, in the order of positions.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..runtime.packing import Documents
from .kv_cache import ForgettingCache, RingCache


def gate_sums(
    log_forget: Float[Tensor, "B T H"], cache: ForgettingCache | None, documents: Documents | None
) -> tuple[Float[Tensor, "B M H"], Float[Tensor, "B T H"]]:
    """Return the sums of log forget gates up to each key and up to each query, from the segment's first token on.

    The keys are those of `join_key_values`. A cached key comes before the first token, so its sum is minus the sum of
    the gates after it and before the segment. With packed documents, sums begin at the first token of the row.
    """
    segment = log_forget.double().cumsum(dim=1)
    if cache is None:
        return segment, segment
    past = -_sum_later_gates(cache)
    if documents is not None:  # each document's cache ends where the document begins
        past = past + F.pad(segment[0], (0, 0, 1, 0))[documents.cu_seqlens[:-1]][:, None]
        past = past.flatten(0, 1)[None]
    return torch.cat((past, segment), dim=1), segment


def gate_sums_after_write(
    log_forget: Float[Tensor, "B T H"], cache: ForgettingCache
) -> tuple[Float[Tensor, "B M H"], Float[Tensor, "B T H"]]:
    """Return the sums of log forget gates up to each key of a cache that includes the segment, and up to each query.

    Sums are relative to the segment's last token, whose sum is 0.
    """
    segment = log_forget.double().cumsum(dim=1)
    return -_sum_later_gates(cache), segment - segment[:, -1:]


def gate_bias(
    sums: tuple[Float[Tensor, "B M H"], Float[Tensor, "B T H"]], dtype: torch.dtype
) -> Float[Tensor, "B H T M"]:
    """Return the forget gates' bias of the scores, c_n - c_m for query n and key m: float64 sums, rounded to `dtype`.

    In float32 every sum is split into the nearest float32 and a remainder, and the two are subtracted separately.
    Differences of the nearest floats are exact, or far from 0.
    """
    of_key, of_query = (x.transpose(1, 2).contiguous() for x in sums)
    of_key = of_key[:, :, None]
    of_query = of_query[..., None]
    if dtype == torch.float64:
        return of_query - of_key
    nearest = [x.detach().to(dtype) for x in (of_query, of_key)]
    remainder = [(x - y.double()).to(dtype) for x, y in zip((of_query, of_key), nearest, strict=True)]
    return (nearest[0] - nearest[1]).add_(remainder[0]).sub_(remainder[1])


def _sum_later_gates(cache: ForgettingCache) -> Float[Tensor, "N S H"]:
    """Return, for each slot, the sum of the log forget gates of later tokens in the cache."""
    ring = cache.cache
    gates = cache.log_forget.double()
    if not isinstance(ring, RingCache):
        return _sum_after(gates)
    # slots in the order of positions; empty ones, which hold zeros, come first
    first = ring.length[:, None] - gates.shape[1]
    slot_of_rank = ring.slots(first + torch.arange(gates.shape[1], device=gates.device))
    rank_of_slot = ring.positions(ring.length, gates.shape[1]) - first
    ordered = gates.gather(1, _expand_index(slot_of_rank, gates))
    return _sum_after(ordered).gather(1, _expand_index(rank_of_slot, gates))


def _sum_after(x: Float[Tensor, "N S H"]) -> Float[Tensor, "N S H"]:
    """Return out[j] = x[j+1] + .. + x[last] along dimension 1."""
    return F.pad(x[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1) if x.shape[1] else x


def _expand_index(index: Tensor, like: Tensor) -> Tensor:
    """Expand an index [N S] to the shape of `like`, [N S H], as `gather` requires."""
    return index[..., None].expand(like.shape)
