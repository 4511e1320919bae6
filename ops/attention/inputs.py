"""One call of softmax attention (notation of api.py): what every kernel takes, and what no kernel takes."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...registry import SeqmixError
from ..recurrence.family import require_chunk_size, require_floats, require_packing
from ..runtime.custom_op import needs_grad
from ..runtime.kernel import Probe
from ..runtime.packing import Documents, require_async
from .forget_gates import gate_bias, offered_sums, written_sums
from .kv_cache import Cache, ForgettingCache, KeyCache, Offer, final_cache, key_cache, offer_of, offer_written, row_of


class AttentionInputs(NamedTuple):
    """One call of softmax attention: what a kernel takes."""

    q: Float[Tensor, "B T H K"]
    k: Float[Tensor, "B T G K"]
    """Of all T tokens of the row, where q is of one process's."""
    v: Float[Tensor, "B T G V"]
    scale: float
    cache: Cache | None
    """What was read before; None means nothing."""
    documents: Documents | None
    """Those of a packed row; caches then have one row per document."""
    output_final_state: bool
    chunk_size: int
    window: int | None = None
    """Keys that a query sees, its own included; None means all."""
    log_decay: Float[Tensor, " K"] | None = None
    """Natural log of the decay per token of distance, for each key dimension, <= 0."""
    log_forget: Float[Tensor, "B T H"] | None = None
    """Natural log of each token's forget gate, <= 0; of all tokens of the row, as k."""
    slopes: Float[Tensor, " H"] | None = None
    """What is taken from a score per token of distance (ALiBi)."""
    softcap: float | None = None
    """The bound of scores, before gates and slopes."""
    sinks: Float[Tensor, " H"] | None = None
    """The score of one more key, without a value."""
    donated: bool = False
    """True if the final cache may be written over the given one."""
    value_dims: int | None = None
    """Values are the first dimensions of the keys, so many, and v is empty; None where they have their own."""

    def final(self) -> Cache | None:
        """The cache after the segment, if it is wanted."""
        if not self.output_final_state:
            return None
        return final_cache(
            self.k, self.v, self.window, self.cache, self.documents, self.log_forget, donated=self.donated
        )

    @property
    def kept(self) -> KeyCache | None:
        """The keys and values that were read before."""
        return None if self.cache is None else key_cache(self.cache)

    def offer(self) -> Offer:
        """The keys and values that the queries may see: the old cache's, then the segment's."""
        offer = offer_of(self.k, self.v, self.kept, self.documents)
        if self.log_forget is not None:
            past = self.cache if isinstance(self.cache, ForgettingCache) else None
            offer = offer._replace(sums=offered_sums(self.log_forget, past, self.documents))
        return self._with_values(offer)

    def written(self, after: Cache) -> Offer:
        """The same of a cache that has taken the segment in already."""
        assert self.cache is not None
        offer = offer_written(key_cache(after), self.cache.length, self.k)
        if self.log_forget is not None and isinstance(after, ForgettingCache):
            offer = offer._replace(sums=written_sums(self.log_forget, after))
        return self._with_values(offer)

    def _with_values(self, offer: Offer) -> Offer:
        return offer if self.value_dims is None else offer._replace(values=offer.keys[..., : self.value_dims])

    def bias(self, places: Tensor, offer: Offer) -> Float[Tensor, "_ H T M"] | None:
        """What is added to the scores of queries at `places`, float32 or float64; None is nothing."""
        wide = torch.promote_types(self.q.dtype, torch.float32)
        bias = None if offer.sums is None else gate_bias(offer.sums, wide)
        if self.slopes is not None:
            distance = (places[:, None] - offer.places[:, None]).to(wide)
            sloped = -self.slopes[:, None, None].to(wide) * distance[:, None]
            bias = sloped if bias is None else bias.add_(sloped)
        return bias

    def by_document(self) -> list["AttentionInputs"]:
        """The call as one of each document, which cost their sum; itself where the host does not know them."""
        if self.documents is None or self.documents.boundaries is None:
            return [self]
        spans = enumerate(pairwise(self.documents.boundaries))
        return [self._document(n, slice(*span)) for n, span in spans if span[0] < span[1]]

    def _document(self, number: int, tokens: slice) -> "AttentionInputs":
        return self._replace(
            q=self.q[:, tokens],
            k=self.k[:, tokens],
            v=self.v[:, tokens],
            log_forget=None if self.log_forget is None else self.log_forget[:, tokens],
            cache=None if self.cache is None else row_of(self.cache, number),
            documents=None,
        )

    @property
    def scores(self) -> tuple[str, ...]:
        """What changes scores beside their scale, decay and window, by name."""
        return tuple(name for name in ("log_forget", "slopes", "softcap", "sinks") if getattr(self, name) is not None)

    def probe(self) -> Probe:
        """What this call asks of a kernel."""
        cached = () if self.kept is None else self.kept[:2]
        return Probe(
            device=self.q.device,
            dtype=self.q.dtype,
            key_width=self.q.shape[3],
            value_width=self.v.shape[3],
            log_decay=None if self.log_decay is None else "K",
            window=self.window is not None,
            needs_grad=needs_grad(self.q, self.k, self.v, self.log_decay, *cached),
            scores=self.scores,
        )


def without_scores(backend: str, probe: Probe) -> list[str]:
    """The reason why a backend that knows scores of products alone cannot run what it is asked, if there is one."""
    return [f"{backend} has no {' and no '.join(probe.scores)}, as sdpa has"] if probe.scores else []


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
    query = places[:, None]
    key = offer.places[:, None]
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


def require_attention(x: AttentionInputs) -> None:
    """Refuse shapes and dtypes that no kernel takes."""
    q, k, v = x.q, x.k, x.v
    require_floats(q, k, v)
    shapes = (q.shape, k.shape, v.shape)
    fit = all(len(shape) == 4 for shape in shapes) and q.shape[:2] == k.shape[:2] == v.shape[:2]
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
    _require_scores(x)
    _require_cache(x, q.shape[0] if x.documents is None else x.documents.number)


def _require_scores(x: AttentionInputs) -> None:
    """Refuse what does not fit the heads, or is no bound of scores."""
    n_heads = x.q.shape[2]
    shapes = {"log_forget": (*x.k.shape[:2], n_heads), "slopes": (n_heads,), "sinks": (n_heads,)}
    for name, shape in shapes.items():
        given = getattr(x, name)
        if given is not None and (given.shape != shape or not given.is_floating_point()):
            raise SeqmixError(f"{name} must be floats {list(shape)}, is {list(given.shape)} of {given.dtype}")
    if x.softcap is not None and not 0 < x.softcap < math.inf:
        raise SeqmixError(f"softcap bounds scores, so it is a number above 0 (None for no bound), and is {x.softcap}")
    widest = x.k.shape[3]
    if x.value_dims is not None and not (0 < x.value_dims <= widest and x.v.shape[3] == 0):
        raise SeqmixError(
            f"value_dims are from 1 to the {widest} of the keys, with an empty v; given are {x.value_dims} and "
            f"{list(x.v.shape)}"
        )


def _require_cache(x: AttentionInputs, rows: int) -> None:
    """Refuse a cache of another call."""
    if x.cache is None:
        return
    if isinstance(x.cache, ForgettingCache) != (x.log_forget is not None):
        kept, given = ("has", "not given") if x.log_forget is None else ("has no", "given")
        raise SeqmixError(f"the cache {kept} forget gates, and log_forget is {given}: they go together")
    kept, (n_kv_heads, key_dim), value_dim = key_cache(x.cache), x.k.shape[2:], x.v.shape[3]
    needed = [[rows, n_kv_heads, key_dim], [rows, n_kv_heads, value_dim], [rows]]
    leaves = list(kept)
    if isinstance(x.cache, ForgettingCache):
        needed = [*needed, [rows, x.q.shape[2]]]
        leaves = [*leaves, x.cache.log_forget]
    if needed != [[*leaf.shape[:1], *leaf.shape[2:]] for leaf in leaves]:
        raise SeqmixError(
            f"the cache must have {rows} rows of {n_kv_heads} heads of {key_dim} (keys) and {value_dim} (values); "
            f"its leaves are {', '.join(str(list(leaf.shape)) for leaf in leaves)}"
        )
