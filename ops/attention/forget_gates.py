"""Forget gates of keys (Forgetting Transformer, arXiv 2503.02130; notation of api.py).

    s_nm += sum_{m < l <= n} log f_l = c_n - c_m          c_n = sum_{l <= n} log f_l, by query head

Only differences count, so sums may begin at any token. They are float64: c grows with the length of the sequence, and
what float32 leaves of two large sums once they are subtracted is not the gates of a few tokens. A cache keeps gates and
no sums (`ForgettingCache`), which are added up here from its last token back, in the order of positions.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..runtime.packing import Documents
from .kv_cache import ForgettingCache, RingCache


def offered_sums(
    log_forget: Float[Tensor, "B T H"], cache: ForgettingCache | None, documents: Documents | None
) -> tuple[Float[Tensor, "B M H"], Float[Tensor, "B T H"]]:
    """Of what `offer_of` offers, and of the queries: from the first token of the segment (of a packed row) on."""
    own = log_forget.double().cumsum(dim=1)
    if cache is None:
        return own, own
    past = -_later(cache)
    if documents is not None:  # each document's cache ends where it begins
        past = past + F.pad(own[0], (0, 0, 1, 0))[documents.cu_seqlens[:-1]][:, None]
        past = past.flatten(0, 1)[None]
    return torch.cat((past, own), dim=1), own


def written_sums(
    log_forget: Float[Tensor, "B T H"], cache: ForgettingCache
) -> tuple[Float[Tensor, "B M H"], Float[Tensor, "B T H"]]:
    """The same where the cache has taken the segment in already: from its last token on."""
    own = log_forget.double().cumsum(dim=1)
    return -_later(cache), own - own[:, -1:]


def gate_bias(
    sums: tuple[Float[Tensor, "B M H"], Float[Tensor, "B T H"]], dtype: torch.dtype
) -> Float[Tensor, "B H T M"]:
    """What is added to the scores, as exact as its float64 sums: c_n - c_m rounded to `dtype`.

    In float32 a sum is two numbers, the nearest to it and the rest. Differences of the first are exact or far from 0.
    """
    of_key, of_query = (x.transpose(1, 2).contiguous() for x in sums)
    of_key = of_key[:, :, None]
    of_query = of_query[..., None]
    if dtype == torch.float64:
        return of_query - of_key
    near = [x.detach().to(dtype) for x in (of_query, of_key)]
    rest = [(x - y.double()).to(dtype) for x, y in zip((of_query, of_key), near, strict=True)]
    return (near[0] - near[1]).add_(rest[0]).sub_(rest[1])


def _later(cache: ForgettingCache) -> Float[Tensor, "N S H"]:
    """By slot, the sum of the gates of later tokens."""
    ring = cache.cache
    gates = cache.log_forget.double()
    if not isinstance(ring, RingCache):
        return _exclusive(gates)
    # slots by position; empty ones, which hold zeros, come first
    first = ring.length[:, None] - gates.shape[1]
    ordered = ring.slots(first + torch.arange(gates.shape[1], device=gates.device))
    place = ring.positions(ring.length, gates.shape[1]) - first
    gates, place = gates.gather(1, _wide(ordered, gates)), _wide(place, gates)
    return _exclusive(gates).gather(1, place)


def _exclusive(x: Float[Tensor, "N S H"]) -> Float[Tensor, "N S H"]:
    """Sums of what comes later."""
    return F.pad(x[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1) if x.shape[1] else x


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand(like.shape)
