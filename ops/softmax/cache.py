"""The state of softmax attention: a cache of keys and values, what it offers to a segment, and what it becomes.

Notation: B batch, T tokens, G key heads, K key width, V value width, S slots of a cache, N rows of the state (packed
documents, or the batch).
"""

from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...registry import SeqmixError
from ..packing import Documents, advance, require_async


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


Cache: TypeAlias = GrowingCache | RingCache


def empty_cache(
    kind: type[GrowingCache] | type[RingCache], rows: int, capacity: int, sizes: tuple[int, int, int], like: Tensor
) -> Cache:
    """The cache of nothing read, of the dtype and device of `like`; sizes are G, K and V.

    Raises:
        SeqmixError: a ring has no capacity.
    """
    if kind is RingCache and capacity < 1:
        raise SeqmixError(f"a ring cache holds at least 1 token, and {capacity} was asked for")
    n_heads, *widths = sizes
    keys, values = (like.new_zeros(rows, capacity, n_heads, width) for width in widths)
    return kind(keys, values, like.new_zeros(rows, dtype=torch.int64))


def moved(cache: Cache, kind: type[GrowingCache] | type[RingCache], capacity: int) -> Cache:
    """The last `capacity` keys and values of a cache, in one of another kind or capacity."""
    rows, held, n_heads, key_dim = cache.keys.shape
    empty = empty_cache(kind, rows, capacity, (n_heads, key_dim, cache.values.shape[3]), cache.keys)
    positions = kind.positions(cache.length, capacity)
    there = (positions >= 0) & (positions >= cache.length[:, None] - held)
    row, slot = there.nonzero(as_tuple=True)
    source = cache.slots(positions)[row, slot]
    empty.keys[row, slot], empty.values[row, slot] = cache.keys[row, source], cache.values[row, source]
    return empty._replace(length=cache.length)


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
        )


def first_key(start: int, cached: int, window: int | None) -> int:
    """The first key of an offer that a query at `start` sees; the cache's are in no order, so all of them or none."""
    return 0 if window is None or start < window - 1 else cached + start - window + 1


def offer_of(k: Tensor, v: Tensor, cache: Cache | None, documents: Documents | None) -> Offer:
    """The old cache and the segment."""
    batch_size, length = k.shape[:2]
    own_places = torch.arange(length, device=k.device)[None]
    own = None if documents is None else documents.of_token
    if cache is None:
        return Offer(k, v, own_places, None if own is None else (own, own), 0)
    keys, values = cache.keys.to(k.dtype), cache.values.to(v.dtype)
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


def offer_written(cache: Cache, read_before: Tensor, k: Tensor) -> Offer:
    """A cache that has taken the segment in already."""
    places = _places_of_slots(cache, read_before, k.shape[1], None)
    return Offer(cache.keys.to(k.dtype), cache.values.to(k.dtype), places, None, cache.keys.shape[1])


def _places_of_slots(cache: Cache, read_before: Tensor, length: int, documents: Documents | None) -> Tensor:
    """Places of a cache's slots counted from a segment's first token, [N S]; `length` where a slot is empty."""
    position = cache.positions(cache.length, cache.keys.shape[1])
    start = 0 if documents is None else documents.cu_seqlens[:-1, None]
    return torch.where(position >= 0, position - read_before[:, None] + start, length)


def final_cache(k: Tensor, v: Tensor, window: int | None, cache: Cache | None, documents: Documents | None) -> Cache:
    """The cache after the segment."""
    batch_size, length = k.shape[:2]
    if cache is None:
        rows = batch_size if documents is None else documents.number
        sizes = (k.shape[2], k.shape[3], v.shape[3])
        if window is None:
            cache = empty_cache(GrowingCache, rows, 0, sizes, k)
        else:
            cache = empty_cache(RingCache, rows, window, sizes, k)
    k, v = k.to(cache.keys.dtype), v.to(cache.values.dtype)
    read = advance(cache.length, batch_size, length, documents, k.device)
    capacity = cache.keys.shape[1]
    if isinstance(cache, RingCache) and (window is None or window > capacity):
        require_async(
            (read <= capacity).all(),
            "the cache was allocated for fewer tokens than are read: pass a larger max_length to init_state",
        )
    if documents is not None:
        return _with_documents(cache, k, v, read, documents.cu_seqlens)
    if isinstance(cache, GrowingCache):
        return GrowingCache(torch.cat((cache.keys, k), dim=1), torch.cat((cache.values, v), dim=1), read)
    stored = min(length, capacity)
    row = torch.arange(batch_size, device=k.device)[:, None]
    slot = cache.slots(read[:, None] + torch.arange(-stored, 0, device=k.device))
    # rows that share memory (a state expanded over a batch) must part before they are written
    shared = any(leaf.stride(0) == 0 and batch_size > 1 for leaf in (cache.keys, cache.values))
    write = Tensor.index_put if torch.is_grad_enabled() or shared else Tensor.index_put_
    keys = write(cache.keys, (row, slot), k[:, length - stored :])
    values = write(cache.values, (row, slot), v[:, length - stored :])
    return RingCache(keys, values, read)


def _with_documents(cache: Cache, k: Tensor, v: Tensor, read: Tensor, cu_seqlens: Tensor) -> Cache:
    """Every row of a cache continued by its packed document: each slot is gathered from where its position is."""
    length, (rows, capacity) = k.shape[1], cache.keys.shape[:2]
    grown = capacity + length if isinstance(cache, GrowingCache) else capacity
    position = cache.positions(read, grown)
    is_new = position >= cache.length[:, None]
    new = position - cache.length[:, None] + cu_seqlens[:-1, None]
    old = cache.slots(position) + capacity * torch.arange(rows, device=k.device)[:, None]
    # the pool is the old rows, the new tokens, and a zero for empty slots
    source = torch.where(is_new, rows * capacity + new, old).masked_fill(position < 0, rows * capacity + length)

    def gather(past: Tensor, tokens: Tensor) -> Tensor:
        pool = torch.cat((past.flatten(0, 1), tokens[0], tokens.new_zeros(1, *tokens.shape[2:])))
        return pool[source]

    return type(cache)(gather(cache.keys, k), gather(cache.values, v), read)
