"""Inputs of softmax attention kernels, and the checks that apply to all of them (notation of api.py)."""

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
from .forget_gates import gate_bias, gate_sums, gate_sums_after_write
from .kv_cache import (
    Cache,
    ForgettingCache,
    KeyCache,
    KeyValues,
    cached_key_values,
    final_cache,
    is_known_empty,
    join_key_values,
    key_cache,
    row_of,
)


class AttentionInputs(NamedTuple):
    """Inputs of a softmax attention kernel."""

    q: Float[Tensor, "B T H K"]
    """Queries of the segment."""
    k: Float[Tensor, "B T G K"]
    """Keys of the segment; of the whole row if a context-parallel group gathers keys."""
    v: Float[Tensor, "B T G V"]
    """Values, of the same tokens as k."""
    scale: float
    """Number that query-key products are multiplied by."""
    cache: Cache | None
    """Cache of the tokens before the segment; None if there are none."""
    documents: Documents | None
    """Documents of a packed row (a cache then has one row per document); None if the batch is not packed."""
    output_final_state: bool
    """True if the cache after the segment is requested."""
    chunk_size: int
    """Queries per block of the chunkwise paradigm."""
    window: int | None = None
    """Number of keys that a query sees, including its own; None means all."""
    log_decay: Float[Tensor, " K"] | None = None
    """Natural log of the decay per token of distance, for each key dimension, <= 0."""
    log_forget: Float[Tensor, "B T H"] | None = None
    """Natural log of each token's forget gate, <= 0; of the same tokens as k."""
    slopes: Float[Tensor, " H"] | None = None
    """ALiBi slope: subtracted from a score per token of distance."""
    softcap: float | None = None
    """Soft bound of the scores, before gates and slopes are added."""
    sinks: Float[Tensor, " H"] | None = None
    """Attention sink: score of an additional key with a value of zero, one per head."""
    donated: bool = False
    """True if the final cache may be written over the initial one."""
    value_dims: int | None = None
    """Number of leading key dimensions that are used as the values (v is then empty); None if v has the values."""

    written_cache: Cache | None = None
    """Cache after the segment, if another call with the same keys and values has returned it."""

    def final(self) -> Cache | None:
        """Return the cache after the segment; None unless requested."""
        if not self.output_final_state:
            return None
        if self.written_cache is not None:
            return self.written_cache
        return final_cache(
            self.k, self.v, self.window, self.cache, self.documents, self.log_forget, donated=self.donated
        )

    @property
    def key_cache(self) -> KeyCache | None:
        """Initial cache without forget gates; None if there is no cache."""
        return None if self.cache is None else key_cache(self.cache)

    def key_values(self) -> KeyValues:
        """Return the keys and values that the queries may see: those of the initial cache, then the segment's."""
        cache = self.cache
        past = self.key_cache
        # the empty slots of a cache with room for a prompt would cost as much as the prompt's own keys
        if past is not None and self.q.shape[1] > 1 and not needs_grad(past.keys) and is_known_empty(past):
            cache = past = None
        kv = join_key_values(self.k, self.v, past, self.documents)
        if self.log_forget is not None:
            gates = cache if isinstance(cache, ForgettingCache) else None
            kv = kv._replace(sums=gate_sums(self.log_forget, gates, self.documents))
        return self._select_values(kv)

    def key_values_after_write(self, final_cache: Cache) -> KeyValues:
        """Return the keys and values of a cache that already includes the segment."""
        assert self.cache is not None
        kv = cached_key_values(key_cache(final_cache), self.cache.length, self.k)
        if self.log_forget is not None and isinstance(final_cache, ForgettingCache):
            kv = kv._replace(sums=gate_sums_after_write(self.log_forget, final_cache))
        return self._select_values(kv)

    def _select_values(self, kv: KeyValues) -> KeyValues:
        """Take the values from the keys if `value_dims` is set."""
        return kv if self.value_dims is None else kv._replace(values=kv.keys[..., : self.value_dims])

    def bias(self, places: Tensor, kv: KeyValues) -> Float[Tensor, "_ H T M"] | None:
        """Return the sum of what forget gates and slopes add to the scores, float32 or float64; None means zero.

        `places` are the queries' positions relative to the segment's first token.
        """
        wide = torch.promote_types(self.q.dtype, torch.float32)
        bias = None if kv.sums is None else gate_bias(kv.sums, wide)
        if self.slopes is not None:
            distance = (places[:, None] - kv.places[:, None]).to(wide)
            alibi = -self.slopes[:, None, None].to(wide) * distance[:, None]
            bias = alibi if bias is None else bias.add_(alibi)
        return bias

    def split_documents(self) -> list["AttentionInputs"]:
        """Return the inputs of each non-empty document; a list of this object alone if nothing can be split.

        Documents computed one by one skip the pairs of tokens of different documents. Splitting needs the boundaries on
        the host.
        """
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
        """Names of the options in use that change scores, besides scale, decay and window."""
        return tuple(name for name in ("log_forget", "slopes", "softcap", "sinks") if getattr(self, name) is not None)

    def probe(self) -> Probe:
        """Return the properties of this call that decide which kernels can run it."""
        cached = () if self.key_cache is None else self.key_cache[:2]
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


def unsupported_scores(backend: str, probe: Probe) -> list[str]:
    """Return the reasons why a backend that has no score options cannot run a call.

    A list of one sentence if the call uses any of these options, else an empty list.
    """
    return [f"{backend} does not support {' or '.join(probe.scores)}"] if probe.scores else []


AttentionOutput = tuple[Float[Tensor, "B T H V"], Cache | None]
"""Output in the dtype of q, and the final cache (None unless requested)."""


def apply_decay(q: Tensor, start: int, kv: KeyValues, log_decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return queries and keys multiplied so that their products include the decay from key to query.

    The queries are at the places start, start + 1, ..., counted from the segment's first token.
    """
    if log_decay is None:
        return q, kv.keys
    length = q.shape[1]
    middle = start + length // 2
    places = torch.arange(start, start + length, device=q.device)
    q = _scale_by_decay(q, places - middle, log_decay)
    # keys after the block are masked for all of its queries, and must not overflow
    return q, _scale_by_decay(kv.keys, (middle - kv.places).clamp(min=middle - start - length), log_decay)


def _scale_by_decay(x: Tensor, distance: Tensor, log_decay: Tensor) -> Tensor:
    """Return x [B T H K] times exp(log_decay * distance), with distance [T] or [B T]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = (distance[..., None, None].to(wide) * log_decay.to(wide)).exp()
    return (x.to(wide) * factor).to(x.dtype)


def visible_keys(places: Tensor, kv: KeyValues, window: int | None) -> Bool[Tensor, "_ 1 T M"]:
    """Return the attention mask: True where a query sees a key.

    `places` are the queries' positions relative to the segment's (or packed row's) first token.
    """
    query = places[:, None]
    key = kv.places[:, None]
    visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    if kv.documents is not None:
        of_key, of_query = kv.documents
        visible = visible & (of_key == of_query[:, None])
    return visible[:, None]


def require_range(log_decay: Tensor | None, length: int, dtype: torch.dtype) -> None:
    """Raise a RuntimeError if decays over `length` tokens, computed at once, would leave the dtype's range.

    On a GPU the error is raised late, when the device reaches the check.
    """
    if log_decay is None:
        return
    # half of the exponent's range is for the factors, the other half for queries and keys
    lowest = -math.log(torch.finfo(dtype).max) / length
    require_async(
        (log_decay >= lowest).all(),
        f"log_decay must be high enough for decays over all tokens of a block to stay within the range of {dtype}, got "
        "lower values: use the chunkwise paradigm or a smaller chunk_size",
    )


def require_attention(x: AttentionInputs) -> None:
    """Raise a SeqmixError for shapes or dtypes that no kernel accepts."""
    q, k, v = x.q, x.k, x.v
    require_floats(q, k, v)
    shapes = (q.shape, k.shape, v.shape)
    consistent = all(len(shape) == 4 for shape in shapes) and q.shape[:2] == k.shape[:2] == v.shape[:2]
    if not consistent or q.shape[1] < 1:
        raise SeqmixError(
            "softmax attention expects q [B T H K], k [B T G K] and v [B T G V] with T >= 1, "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    n_heads, key_dim = q.shape[2:]
    n_kv_heads = k.shape[2]
    if k.shape[3] != key_dim or v.shape[2] != n_kv_heads or n_heads % n_kv_heads:
        raise SeqmixError(
            "k and v must have the same number of heads, which must divide the heads of q; k must be as wide as q; got "
            f"q, k, v of {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if x.window is not None and x.window < 1:
        raise SeqmixError(f"window must be at least 1 (the query's own key), got a window of {x.window}")
    if x.log_decay is not None and x.log_decay.shape != (key_dim,):
        raise SeqmixError(
            f"log_decay must have one number per key dimension [{key_dim}], got {list(x.log_decay.shape)}"
        )
    require_packing(q, None if x.documents is None else x.documents.cu_seqlens)
    require_chunk_size(x.chunk_size)
    _require_scores(x)
    _require_cache(x, q.shape[0] if x.documents is None else x.documents.number)


def _require_scores(x: AttentionInputs) -> None:
    """Raise a SeqmixError for score options of the wrong shape, dtype or range."""
    n_heads = x.q.shape[2]
    shapes = {"log_forget": (*x.k.shape[:2], n_heads), "slopes": (n_heads,), "sinks": (n_heads,)}
    for name, shape in shapes.items():
        tensor = getattr(x, name)
        if tensor is not None and (tensor.shape != shape or not tensor.is_floating_point()):
            raise SeqmixError(
                f"{name} must be a floating-point tensor of shape {list(shape)}, "
                f"got {list(tensor.shape)} of {tensor.dtype}"
            )
    if x.softcap is not None and not 0 < x.softcap < math.inf:
        raise SeqmixError(f"softcap must be a finite number above 0 (or None for no bound), got {x.softcap}")
    key_dim = x.k.shape[3]
    if x.value_dims is not None and not (0 < x.value_dims <= key_dim and x.v.shape[3] == 0):
        raise SeqmixError(
            f"value_dims must be from 1 to {key_dim} (the width of the keys) with an empty v, got {x.value_dims} and "
            f"v of {list(x.v.shape)}"
        )


def _require_cache(x: AttentionInputs, rows: int) -> None:
    """Raise a SeqmixError for a cache that does not match the inputs."""
    if x.cache is None:
        return
    if isinstance(x.cache, ForgettingCache) and x.log_forget is None:
        raise SeqmixError("the cache has forget gates, but log_forget is None: pass both or neither")
    if not isinstance(x.cache, ForgettingCache) and x.log_forget is not None:
        raise SeqmixError("the cache has no forget gates, but log_forget was passed: pass both or neither")
    n_kv_heads, key_dim = x.k.shape[2:]
    value_dim = x.v.shape[3]
    expected = [[rows, n_kv_heads, key_dim], [rows, n_kv_heads, value_dim], [rows]]
    leaves = list(key_cache(x.cache))
    if isinstance(x.cache, ForgettingCache):
        expected = [*expected, [rows, x.q.shape[2]]]
        leaves = [*leaves, x.cache.log_forget]
    if expected != [[*leaf.shape[:1], *leaf.shape[2:]] for leaf in leaves]:
        raise SeqmixError(
            f"the cache must have {rows} rows of {n_kv_heads} heads with keys {key_dim} and values {value_dim} wide, "
            f"got tensors of {', '.join(str(list(leaf.shape)) for leaf in leaves)}"
        )
