"""KV caches, the state of softmax attention: their layouts, the keys and values a segment sees, and their updates.

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
    """Cache of all keys and values so far, right-aligned; every segment (or packed row) of T tokens adds T slots."""

    keys: Float[Tensor, "N S G K"]
    """Keys, one per slot."""
    values: Float[Tensor, "N S G V"]
    """Values, one per slot."""
    length: Int[Tensor, " N"]
    """Number of tokens read, per row."""

    @staticmethod
    def positions(length: Int[Tensor, " N"], capacity: int) -> Int[Tensor, "N S"]:
        """Return the position of the token in each slot; negative if the slot is empty."""
        return length[:, None] - capacity + torch.arange(capacity, device=length.device)

    def slots(self, positions: Int[Tensor, "N _"]) -> Int[Tensor, "N _"]:
        """Return the slot of the token at each position."""
        return positions - self.length[:, None] + self.keys.shape[1]


class RingCache(NamedTuple):
    """Cache of the last S keys and values: the token at position p is in slot p mod S. The capacity never changes."""

    keys: Float[Tensor, "N S G K"]
    """Keys, one per slot."""
    values: Float[Tensor, "N S G V"]
    """Values, one per slot."""
    length: Int[Tensor, " N"]
    """Number of tokens read, per row."""

    @staticmethod
    def positions(length: Int[Tensor, " N"], capacity: int) -> Int[Tensor, "N S"]:
        """Return the position of the token in each slot; negative if the slot is empty."""
        last = length[:, None] - 1
        return last - (last - torch.arange(capacity, device=length.device)) % capacity

    def slots(self, positions: Int[Tensor, "N _"]) -> Int[Tensor, "N _"]:
        """Return the slot of the token at each position."""
        return positions % self.keys.shape[1]


KeyCache: TypeAlias = GrowingCache | RingCache


class ForgettingCache(NamedTuple):
    """KV cache with the forget gate of each key's token.

    It stores gates, not a running sum, because float32 sums lose precision. After 100,000 tokens of log f = -0.01, such
    a sum is wrong by 1e-2 over the last 1,000 tokens; a sum that every token renormalises is wrong by 6e-3 after
    100,000 tokens of -1e-4. forget_gates.py sums the gates in float64 at each call, which costs little compared with
    reading the keys.
    """

    cache: KeyCache
    """Keys and values."""
    log_forget: Float[Tensor, "N S H"]
    """Natural log of the forget gate, float32 or float64, in the slots of the cache."""

    @property
    def length(self) -> Int[Tensor, " N"]:
        """Number of tokens read, per row."""
        return self.cache.length


Cache: TypeAlias = KeyCache | ForgettingCache


class SharedKV(NamedTuple):
    """Keys and values of a segment, for attention that reads those of another layer."""

    k: Float[Tensor, "B T G K"]
    """Keys of the segment, normed and rotated."""
    v: Float[Tensor, "B T G V"]
    """Values of the segment."""
    before: Cache | None
    """Cache before the segment; None if no tokens came before."""
    after: Cache | None
    """Cache after the segment; None if it was not requested."""


def key_cache(cache: Cache) -> KeyCache:
    """Return a cache without its forget gates."""
    return cache.cache if isinstance(cache, ForgettingCache) else cache


def empty_cache(
    kind: type[GrowingCache] | type[RingCache],
    rows: int,
    capacity: int,
    sizes: tuple[int, int, int],
    like: Tensor,
    forget_heads: int | None = None,
) -> Cache:
    """Create a cache in which no tokens have been read.

    Args:
        kind: `GrowingCache` or `RingCache`.
        rows: number of rows: packed documents, or rows of the batch.
        capacity: number of slots.
        sizes: number of key heads, key width and value width.
        like: a tensor with the dtype and device of the keys.
        forget_heads: number of query heads, for a cache with forget gates; None for one without.

    Raises:
        SeqmixError: the capacity of a ring is below 1.
    """
    if kind is RingCache and capacity < 1:
        raise SeqmixError(f"a ring cache must have room for at least 1 token, got a capacity of {capacity}")
    n_heads, *widths = sizes
    keys, values = (like.new_zeros(rows, capacity, n_heads, width) for width in widths)
    cache = kind(keys, values, like.new_zeros(rows, dtype=torch.int64))
    if forget_heads is None:
        return cache
    wide = torch.promote_types(like.dtype, torch.float32)
    return ForgettingCache(cache, like.new_zeros(rows, capacity, forget_heads, dtype=wide))


def resize_cache(cache: Cache, kind: type[GrowingCache] | type[RingCache], capacity: int) -> Cache:
    """Copy the last `capacity` keys and values of a cache into a cache of another kind or capacity."""
    source = key_cache(cache)
    positions = kind.positions(source.length, capacity)
    is_cached = (positions >= 0) & (positions >= source.length[:, None] - source.keys.shape[1])
    row, slot = is_cached.nonzero(as_tuple=True)
    source_slot = source.slots(positions)[row, slot]

    def move(leaf: Tensor) -> Tensor:
        target = leaf.new_zeros(leaf.shape[0], capacity, *leaf.shape[2:])
        target[row, slot] = leaf[row, source_slot]
        return target

    result = kind(move(source.keys), move(source.values), source.length)
    return ForgettingCache(result, move(cache.log_forget)) if isinstance(cache, ForgettingCache) else result


def is_known_empty(cache: KeyCache) -> bool:
    """True if no row of the cache has tokens, and the host may find that out, which waits for the device."""
    length = cache.length
    if type(length) is not Tensor or length.device.type == "meta" or torch.compiler.is_compiling():
        return False
    if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
        return False
    if length.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return not length.any()


def drop_last(cache: Cache, tokens: Int[Tensor, "*_ N"]) -> Cache:
    """Return the cache before the last `tokens` tokens, one number or one per row; it shares the memory of `cache`.

    A `RingCache` must still hold all its tokens: its slots are not moved, and those of later tokens count as empty.
    """
    past = key_cache(cache)
    keys, values = (_without_last(leaf, past, tokens) for leaf in (past.keys, past.values))
    result = type(past)(keys, values, past.length - tokens)
    if isinstance(cache, ForgettingCache):
        return ForgettingCache(result, _without_last(cache.log_forget, past, tokens))
    return result


def _without_last(leaf: Tensor, cache: KeyCache, tokens: Tensor) -> Tensor:
    """Return the slots of a cache without those of each row's last tokens; a growing cache stays right-aligned."""
    if isinstance(cache, RingCache):
        return leaf
    rows, capacity = leaf.shape[:2]
    shift = tokens.expand(rows)[:, None]
    slots = (torch.arange(capacity, device=leaf.device) - shift).clamp(min=0)
    return leaf[torch.arange(rows, device=leaf.device)[:, None], slots]


def row_of(cache: Cache, row: int) -> Cache:
    """Return one row of a cache, as a cache of one row that shares the memory."""
    if isinstance(cache, ForgettingCache):
        return ForgettingCache(_key_row_of(cache.cache, row), cache.log_forget[row : row + 1])
    return _key_row_of(cache, row)


def _key_row_of(cache: KeyCache, row: int) -> KeyCache:
    return type(cache)(*(leaf[row : row + 1] for leaf in cache))


def cast_cache(cache: Cache, dtype: torch.dtype) -> Cache:
    """Return a cache with keys and values cast to a dtype; forget gates keep their own."""
    if isinstance(cache, ForgettingCache):
        return cache._replace(cache=_cast_keys(cache.cache, dtype))
    return _cast_keys(cache, dtype)


def _cast_keys(cache: KeyCache, dtype: torch.dtype) -> KeyCache:
    return cache._replace(keys=cache.keys.to(dtype), values=cache.values.to(dtype))


class KeyValues(NamedTuple):
    """Keys and values that a segment's queries may see: cached ones in any order, then the segment's in order."""

    keys: Float[Tensor, "B M G K"]
    """Keys: cached ones, then the segment's."""
    values: Float[Tensor, "B M G V"]
    """Values of the same tokens as the keys."""
    places: Int[Tensor, "_ M"]
    """Position of each key relative to the segment's (or packed row's) first token; T or more for an empty slot."""
    documents: tuple[Int[Tensor, " M"], Int[Tensor, " T"]] | None
    """Document index of each key, and of each query; None if the batch is not packed."""
    cached: int
    """Number of keys that come from the cache."""
    sums: tuple[Float[Tensor, "B M H"], Float[Tensor, "B T H"]] | None = None
    """Sums of log forget gates up to each key and up to each query, from a common token on, float64."""

    def up_to(self, start: int, stop: int, window: int | None) -> "KeyValues":
        """Return the keys and values that the queries from start to stop - 1 may see."""
        # a packed document may begin inside the block, so all cached keys may be needed
        first = first_key(start, self.cached, window if self.documents is None else None)
        keys = slice(first, self.cached + stop)
        return KeyValues(
            self.keys[:, keys],
            self.values[:, keys],
            self.places[:, keys],
            None if self.documents is None else (self.documents[0][keys], self.documents[1][start:stop]),
            max(0, self.cached - first),
            None if self.sums is None else (self.sums[0][:, keys], self.sums[1][:, start:stop]),
        )


def first_key(start: int, cached: int, window: int | None) -> int:
    """Return the index of the first key that a query at place `start` may see.

    Cached keys are in no order, so either all of them count as visible or none.
    """
    return 0 if window is None or start < window - 1 else cached + start - window + 1


def join_key_values(k: Tensor, v: Tensor, cache: KeyCache | None, documents: Documents | None) -> KeyValues:
    """Concatenate the keys and values of the initial cache and of the segment."""
    batch_size, length = k.shape[:2]
    segment_places = torch.arange(length, device=k.device)[None]
    of_query = None if documents is None else documents.of_token
    if cache is None:
        return KeyValues(k, v, segment_places, None if of_query is None else (of_query, of_query), 0)
    keys = cache.keys.to(k.dtype)
    values = cache.values.to(v.dtype)
    places = _places_of_slots(cache, cache.length, length, documents)
    key_and_query_documents = None
    if of_query is not None:
        row = torch.arange(keys.shape[0], device=k.device, dtype=of_query.dtype)[:, None].expand(places.shape)
        key_and_query_documents = (torch.cat((row.flatten(), of_query)), of_query)
        keys, values, places = (x.flatten(0, 1)[None] for x in (keys, values, places))
    return KeyValues(
        torch.cat((keys, k), dim=1),
        torch.cat((values, v), dim=1),
        torch.cat((places, segment_places.expand(batch_size, -1)), dim=1),
        key_and_query_documents,
        keys.shape[1],
    )


def cached_key_values(cache: KeyCache, read_before: Tensor, k: Tensor) -> KeyValues:
    """Return the keys and values of a cache that already includes the segment whose keys are `k`.

    `read_before` is the number of tokens read before the segment, per row.
    """
    places = _places_of_slots(cache, read_before, k.shape[1], None)
    return KeyValues(cache.keys.to(k.dtype), cache.values.to(k.dtype), places, None, cache.keys.shape[1])


def _places_of_slots(cache: KeyCache, read_before: Tensor, length: int, documents: Documents | None) -> Tensor:
    """Return the places of a cache's slots relative to a segment's first token, [N S]; `length` for an empty slot."""
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
    """Return the cache after the segment.

    `donated` is True if a ring may be written in place even if it holds a window, see `_ring_update`.
    """
    batch_size, length = k.shape[:2]
    if cache is None:
        rows = batch_size if documents is None else documents.number
        kind, capacity = (GrowingCache, 0) if window is None else (RingCache, window)
        sizes = (k.shape[2], k.shape[3], v.shape[3])
        forget_heads = None if log_forget is None else log_forget.shape[2]
        cache = empty_cache(kind, rows, capacity, sizes, k, forget_heads)
    initial = key_cache(cache)
    read = advance(initial.length, batch_size, length, documents, k.device)
    capacity = initial.keys.shape[1]
    if isinstance(initial, RingCache) and (window is None or window > capacity):
        require_async(
            (read <= capacity).all(),
            "the cache was allocated for fewer tokens than are read: pass a larger max_length to init_state",
        )
    if documents is not None:
        update = _document_update(initial, length, read, documents.cu_seqlens)
    elif isinstance(initial, GrowingCache):
        update = _append
    else:
        update = _ring_update(initial, min(length, capacity), read, donated=window is None or donated)
    final = type(initial)(update(initial.keys, k), update(initial.values, v), read)
    if not isinstance(cache, ForgettingCache) or log_forget is None:
        return final
    return ForgettingCache(final, update(cache.log_forget, log_forget))


_Update: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Function from a tensor of a cache and the segment's tokens to the tensor after the segment, in the cache's dtype."""


def _append(past: Tensor, tokens: Tensor) -> Tensor:
    return torch.cat((past, tokens.to(past.dtype)), dim=1)


def _ring_update(ring: RingCache, n_tokens: int, read: Tensor, *, donated: bool) -> _Update:
    """Return the update that writes the last `n_tokens` tokens of a segment to their slots of a ring.

    It writes in place if the ring is donated. Without a window it always is, see `softmax_attention`; with a window, if
    the caller donates it.
    """
    row = torch.arange(read.shape[0], device=read.device)[:, None]
    slot = ring.slots(read[:, None] + torch.arange(-n_tokens, 0, device=read.device))

    def write(past: Tensor, tokens: Tensor) -> Tensor:
        # rows that share memory (a state expanded over a batch) need copies before they are written
        rows_share_memory = past.stride(0) == 0 and past.shape[0] > 1
        in_place = donated and not torch.is_grad_enabled() and not rows_share_memory
        put = Tensor.index_put_ if in_place else Tensor.index_put
        return put(past, (row, slot), tokens[:, tokens.shape[1] - n_tokens :].to(past.dtype))

    return write


def _document_update(cache: KeyCache, length: int, read: Tensor, cu_seqlens: Tensor) -> _Update:
    """Return the update that continues every row of a cache with its packed document, by one gather over all slots."""
    rows, capacity = cache.keys.shape[:2]
    new_capacity = capacity + length if isinstance(cache, GrowingCache) else capacity
    position = cache.positions(read, new_capacity)
    is_new = position >= cache.length[:, None]
    new = position - cache.length[:, None] + cu_seqlens[:-1, None]
    old = cache.slots(position) + capacity * torch.arange(rows, device=read.device)[:, None]
    # gather from: the old rows, the new tokens, and one zero for empty slots
    source = torch.where(is_new, rows * capacity + new, old).masked_fill(position < 0, rows * capacity + length)

    def gather(past: Tensor, tokens: Tensor) -> Tensor:
        tokens = tokens[0].to(past.dtype)
        return torch.cat((past.flatten(0, 1), tokens, tokens.new_zeros(1, *tokens.shape[1:])))[source]

    return gather
