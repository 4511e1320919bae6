"""The state of softmax attention: a cache of keys and values, what it offers to a segment, and what it becomes.

Notation: B batch, T tokens, H query heads, G key heads, K key width, V value width, S slots of a cache, N rows of the
state (packed documents, or the batch).
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...registry import SeqmixError
from ..runtime.packing import Documents, advance, require_async


class GrowingCache(NamedTuple):
    """All keys and values read, right-aligned; its capacity grows by T with every segment, in packed rows too."""

    keys: Float[Tensor, "N S G K"]
    values: Float[Tensor, "N S G V"]
    length: Int[Tensor, " N"]
    """Tokens read."""

    @staticmethod
    def positions(length: Int[Tensor, " N"], capacity: int) -> Int[Tensor, "N S"]:
        """The position that each slot holds, negative where it is empty."""
        return length[:, None] - capacity + torch.arange(capacity, device=length.device)

    def slots(self, positions: Int[Tensor, "N _"]) -> Int[Tensor, "N _"]:
        """The slot that holds each position."""
        return positions - self.length[:, None] + self.keys.shape[1]


class RingCache(NamedTuple):
    """The last S keys and values; position p lives in slot p mod S, and the capacity never changes."""

    keys: Float[Tensor, "N S G K"]
    values: Float[Tensor, "N S G V"]
    length: Int[Tensor, " N"]
    """Tokens read."""

    @staticmethod
    def positions(length: Int[Tensor, " N"], capacity: int) -> Int[Tensor, "N S"]:
        """The position that each slot holds, negative where it is empty."""
        last = length[:, None] - 1
        return last - (last - torch.arange(capacity, device=length.device)) % capacity

    def slots(self, positions: Int[Tensor, "N _"]) -> Int[Tensor, "N _"]:
        """The slot that holds each position."""
        return positions % self.keys.shape[1]


KeyCache: TypeAlias = GrowingCache | RingCache


class ForgettingCache(NamedTuple):
    """A cache under forget gates: with every key the gate of its own token.

    The gates themselves, and no running sum of them: after 100,000 tokens of log f = -0.01, the last 1,000 of a float32
    sum are off by 1e-2; a sum that every token renormalises is off by 6e-3 after 100,000 of -1e-4. forget_gates.py
    adds the gates up in float64 at each call, a small part of reading the keys.
    """

    cache: KeyCache
    log_forget: Float[Tensor, "N S H"]
    """Natural log of the forget gate, float32 or float64, in the slots of the cache."""

    @property
    def length(self) -> Int[Tensor, " N"]:
        """Tokens read."""
        return self.cache.length


Cache: TypeAlias = KeyCache | ForgettingCache


def key_cache(cache: Cache) -> KeyCache:
    """A cache without its gates."""
    return cache.cache if isinstance(cache, ForgettingCache) else cache


def empty_cache(
    kind: type[GrowingCache] | type[RingCache],
    rows: int,
    capacity: int,
    sizes: tuple[int, int, int],
    like: Tensor,
    forget_heads: int | None = None,
) -> Cache:
    """The cache of nothing read, of the dtype and device of `like`.

    Args:
        kind: growing or ring.
        rows: N.
        capacity: S.
        sizes: G, K and V.
        like: of the keys' dtype and device.
        forget_heads: H, under forget gates.

    Raises:
        SeqmixError: a ring has no capacity.
    """
    if kind is RingCache and capacity < 1:
        raise SeqmixError(f"a ring cache holds at least 1 token, and {capacity} was asked for")
    n_heads, *widths = sizes
    keys, values = (like.new_zeros(rows, capacity, n_heads, width) for width in widths)
    cache = kind(keys, values, like.new_zeros(rows, dtype=torch.int64))
    if forget_heads is None:
        return cache
    wide = torch.promote_types(like.dtype, torch.float32)
    return ForgettingCache(cache, like.new_zeros(rows, capacity, forget_heads, dtype=wide))


def moved(cache: Cache, kind: type[GrowingCache] | type[RingCache], capacity: int) -> Cache:
    """The last `capacity` keys and values of a cache, in one of another kind or capacity."""
    kept = key_cache(cache)
    held = kept.keys.shape[1]
    positions = kind.positions(kept.length, capacity)
    there = (positions >= 0) & (positions >= kept.length[:, None] - held)
    row, slot = there.nonzero(as_tuple=True)
    source = kept.slots(positions)[row, slot]

    def move(leaf: Tensor) -> Tensor:
        empty = leaf.new_zeros(leaf.shape[0], capacity, *leaf.shape[2:])
        empty[row, slot] = leaf[row, source]
        return empty

    after = kind(move(kept.keys), move(kept.values), kept.length)
    return ForgettingCache(after, move(cache.log_forget)) if isinstance(cache, ForgettingCache) else after


def row_of(cache: Cache, row: int) -> Cache:
    """One row of a cache."""
    if isinstance(cache, ForgettingCache):
        return ForgettingCache(_row_of(cache.cache, row), cache.log_forget[row : row + 1])
    return _row_of(cache, row)


def _row_of(cache: KeyCache, row: int) -> KeyCache:
    return type(cache)(*(leaf[row : row + 1] for leaf in cache))


def stored_as(cache: Cache, dtype: torch.dtype) -> Cache:
    """A cache with keys and values of a dtype; gates keep theirs."""
    if isinstance(cache, ForgettingCache):
        return cache._replace(cache=_stored_as(cache.cache, dtype))
    return _stored_as(cache, dtype)


def _stored_as(cache: KeyCache, dtype: torch.dtype) -> KeyCache:
    return cache._replace(keys=cache.keys.to(dtype), values=cache.values.to(dtype))


class Offer(NamedTuple):
    """The keys and values that a segment's queries may see: first the cache's, then the segment's own in order."""

    keys: Float[Tensor, "B M G K"]
    values: Float[Tensor, "B M G V"]
    places: Int[Tensor, "_ M"]
    """Counted from the segment's (the packed row's) first token; after the segment's end where a slot is empty."""
    documents: tuple[Int[Tensor, " M"], Int[Tensor, " T"]] | None
    """Of keys and of queries."""
    cached: int
    """How many are the cache's."""
    sums: tuple[Float[Tensor, "B M H"], Float[Tensor, "B T H"]] | None = None
    """Sums of log forget gates up to each key and each query, from one token on, float64."""

    def up_to(self, start: int, stop: int, window: int | None) -> "Offer":
        """What the queries from start to stop - 1 may see."""
        # a packed document may begin inside the block, so its cache may be needed anywhere
        first = first_key(start, self.cached, window if self.documents is None else None)
        keys = slice(first, self.cached + stop)
        return Offer(
            self.keys[:, keys],
            self.values[:, keys],
            self.places[:, keys],
            None if self.documents is None else (self.documents[0][keys], self.documents[1][start:stop]),
            max(0, self.cached - first),
            None if self.sums is None else (self.sums[0][:, keys], self.sums[1][:, start:stop]),
        )


def first_key(start: int, cached: int, window: int | None) -> int:
    """The first key of an offer that a query at `start` sees; the cache's are in no order, so all of them or none."""
    return 0 if window is None or start < window - 1 else cached + start - window + 1


def offer_of(k: Tensor, v: Tensor, cache: KeyCache | None, documents: Documents | None) -> Offer:
    """The old cache and the segment."""
    batch_size, length = k.shape[:2]
    own_places = torch.arange(length, device=k.device)[None]
    own = None if documents is None else documents.of_token
    if cache is None:
        return Offer(k, v, own_places, None if own is None else (own, own), 0)
    keys = cache.keys.to(k.dtype)
    values = cache.values.to(v.dtype)
    places = _places_of_slots(cache, cache.length, length, documents)
    pairs = None
    if own is not None:
        row = torch.arange(keys.shape[0], device=k.device, dtype=own.dtype)[:, None].expand(places.shape)
        pairs = (torch.cat((row.flatten(), own)), own)
        keys, values, places = (x.flatten(0, 1)[None] for x in (keys, values, places))
    return Offer(
        torch.cat((keys, k), dim=1),
        torch.cat((values, v), dim=1),
        torch.cat((places, own_places.expand(batch_size, -1)), dim=1),
        pairs,
        keys.shape[1],
    )


def offer_written(cache: KeyCache, read_before: Tensor, k: Tensor) -> Offer:
    """A cache that has taken the segment in already."""
    places = _places_of_slots(cache, read_before, k.shape[1], None)
    return Offer(cache.keys.to(k.dtype), cache.values.to(k.dtype), places, None, cache.keys.shape[1])


def _places_of_slots(cache: KeyCache, read_before: Tensor, length: int, documents: Documents | None) -> Tensor:
    """Places of a cache's slots counted from a segment's first token, [N S]; `length` where a slot is empty."""
    position = cache.positions(cache.length, cache.keys.shape[1])
    start = 0 if documents is None else documents.cu_seqlens[:-1, None]
    return torch.where(position >= 0, position - read_before[:, None] + start, length)


def final_cache(
    k: Tensor,
    v: Tensor,
    window: int | None,
    cache: Cache | None,
    documents: Documents | None,
    log_forget: Tensor | None = None,
    *,
    donated: bool = False,
) -> Cache:
    """The cache after the segment; `donated`: a ring that its window bounds may be written in place."""
    batch_size, length = k.shape[:2]
    if cache is None:
        rows = batch_size if documents is None else documents.number
        kind, capacity = (GrowingCache, 0) if window is None else (RingCache, window)
        sizes = (k.shape[2], k.shape[3], v.shape[3])
        forget_heads = None if log_forget is None else log_forget.shape[2]
        cache = empty_cache(kind, rows, capacity, sizes, k, forget_heads)
    kept = key_cache(cache)
    read = advance(kept.length, batch_size, length, documents, k.device)
    capacity = kept.keys.shape[1]
    if isinstance(kept, RingCache) and (window is None or window > capacity):
        require_async(
            (read <= capacity).all(),
            "the cache was allocated for fewer tokens than are read: pass a larger max_length to init_state",
        )
    if documents is not None:
        continue_ = _with_documents(kept, length, read, documents.cu_seqlens)
    elif isinstance(kept, GrowingCache):
        continue_ = _grown
    else:
        continue_ = _written(kept, min(length, capacity), read, donated=window is None or donated)
    after = type(kept)(continue_(kept.keys, k), continue_(kept.values, v), read)
    if not isinstance(cache, ForgettingCache) or log_forget is None:
        return after
    return ForgettingCache(after, continue_(cache.log_forget, log_forget))


_Continue: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""What makes of a leaf of the cache and the segment's tokens the leaf after them, in the leaf's dtype."""


def _grown(past: Tensor, tokens: Tensor) -> Tensor:
    return torch.cat((past, tokens.to(past.dtype)), dim=1)


def _written(ring: RingCache, stored: int, read: Tensor, *, donated: bool) -> _Continue:
    """The last `stored` tokens in their slots of a ring; in its place where it is donated, which a growing state is by
    contract, and a constant one if its owner says so."""
    row = torch.arange(read.shape[0], device=read.device)[:, None]
    slot = ring.slots(read[:, None] + torch.arange(-stored, 0, device=read.device))

    def write(past: Tensor, tokens: Tensor) -> Tensor:
        # rows that share memory (a state expanded over a batch) must part before they are written
        shared = past.stride(0) == 0 and past.shape[0] > 1
        put = Tensor.index_put_ if donated and not torch.is_grad_enabled() and not shared else Tensor.index_put
        return put(past, (row, slot), tokens[:, tokens.shape[1] - stored :].to(past.dtype))

    return write


def _with_documents(cache: KeyCache, length: int, read: Tensor, cu_seqlens: Tensor) -> _Continue:
    """Every row of a cache continued by its packed document: each slot is gathered from where its position is."""
    rows, capacity = cache.keys.shape[:2]
    grown = capacity + length if isinstance(cache, GrowingCache) else capacity
    position = cache.positions(read, grown)
    is_new = position >= cache.length[:, None]
    new = position - cache.length[:, None] + cu_seqlens[:-1, None]
    old = cache.slots(position) + capacity * torch.arange(rows, device=read.device)[:, None]
    # the pool is the old rows, the new tokens, and a zero for empty slots
    source = torch.where(is_new, rows * capacity + new, old).masked_fill(position < 0, rows * capacity + length)

    def gather(past: Tensor, tokens: Tensor) -> Tensor:
        tokens = tokens[0].to(past.dtype)
        return torch.cat((past.flatten(0, 1), tokens, tokens.new_zeros(1, *tokens.shape[1:])))[source]

    return gather
