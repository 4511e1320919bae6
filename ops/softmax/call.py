"""One call of softmax attention (notation of api.py): what every kernel takes, and what no kernel takes."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...registry import SeqmixError
from ..autograd import needs_grad
from ..kernels import Probe
from ..packing import Documents, require_async
from ..recurrence import require_chunk_size, require_floats, require_packing
from .cache import Cache, Offer, final_cache, offer_of


class Attention(NamedTuple):
    """One call of softmax attention: what a kernel takes."""

    q: Float[Tensor, "B T H K"]
    k: Float[Tensor, "B T G K"]
    """Of all T tokens of the row, where q is of one process's."""
    v: Float[Tensor, "B T G V"]
    scale: float
    window: int | None
    """Keys that a query sees, its own included; None means all."""
    log_decay: Float[Tensor, " K"] | None
    """Natural log of the decay per token of distance, for each key dimension, <= 0."""
    cache: Cache | None
    """What was read before; None means nothing."""
    documents: Documents | None
    """Those of a packed row; caches then have one row per document."""
    output_final_state: bool
    chunk_size: int

    def final(self) -> Cache | None:
        """The cache after the segment, if it is wanted."""
        if not self.output_final_state:
            return None
        return final_cache(self.k, self.v, self.window, self.cache, self.documents)

    def offer(self) -> Offer:
        """The keys and values that the queries may see: the old cache's, then the segment's."""
        return offer_of(self.k, self.v, self.cache, self.documents)

    def probe(self) -> Probe:
        """What this call asks of a kernel."""
        cached = () if self.cache is None else self.cache[:2]
        return Probe(
            device=self.q.device,
            dtype=self.q.dtype,
            key_width=self.q.shape[3],
            value_width=self.v.shape[3],
            log_decay=None if self.log_decay is None else "K",
            window=self.window is not None,
            needs_grad=needs_grad(self.q, self.k, self.v, self.log_decay, *cached),
        )


AttentionOutput = tuple[Float[Tensor, "B T H V"], Cache | None]
"""The output in the dtype of q, and the final state (None unless wanted)."""


def factored(q: Tensor, start: int, offer: Offer, log_decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries at the places start, start + 1, ... and an offer's keys, each with its factor of the decay."""
    if log_decay is None:
        return q, offer.keys
    length = q.shape[1]
    middle = start + length // 2
    places = torch.arange(start, start + length, device=q.device)
    q = _decayed(q, places - middle, log_decay)
    # keys after the block are masked for all of its queries, and must not overflow
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


def require_attention(x: Attention, segments: int = 1) -> None:
    """Refuse shapes and dtypes that no kernel takes; queries are one of so many `segments` of the keys' row."""
    q, k, v = x.q, x.k, x.v
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
    if x.window is not None and x.window < 1:
        raise SeqmixError(f"a window of {x.window} keys leaves out the query's own: 1 is the smallest")
    if x.log_decay is not None and x.log_decay.shape != (key_dim,):
        raise SeqmixError(f"log_decay must be one scalar per key dimension [{key_dim}], is {list(x.log_decay.shape)}")
    require_packing(q, None if x.documents is None else x.documents.cu_seqlens)
    require_chunk_size(x.chunk_size)
    rows = q.shape[0] if x.documents is None else x.documents.number
    if x.cache is not None:
        needed = ([rows, n_kv_heads, key_dim], [rows, n_kv_heads, v.shape[3]], [rows])
        given = ([*leaf.shape[:1], *leaf.shape[2:]] for leaf in x.cache)
        if any(a != b for a, b in zip(needed, given, strict=True)):
            raise SeqmixError(
                f"the cache must have {rows} rows of {n_kv_heads} heads of {key_dim} (keys) and {v.shape[3]} (values); "
                f"its leaves are {', '.join(str(list(leaf.shape)) for leaf in x.cache)}"
            )
