"""Base class of mixers of the softmax family, whose state is a KV cache."""

from abc import abstractmethod
from typing import Any, NamedTuple, Self, TypeAlias

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from ...ops.attention import Cache, GrowingCache, RingCache, cast_cache, drop_last, empty_cache, key_cache, resize_cache
from ..base.contract import MixerConfig, SequenceMixer
from ..base.rollback import kept_tokens
from ..base.traits import require_capacity
from .short_convolution import ShortConvolution
from .widths import divisors


class GroupedQueryConfig(MixerConfig):
    """Fields of mixers in which several query heads may share keys and values (grouped-query attention)."""

    n_heads: int = Field(gt=0, examples=[2, 1, 6])
    """Number of query heads."""
    n_kv_heads: int | None = Field(default=None, gt=0, examples=[1])
    """Number of key and value heads, each shared by n_heads / n_kv_heads query heads; n_heads when null."""

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads must divide n_heads = {self.n_heads}, got {self.n_kv_heads}: "
                f"choose one of {divisors(self.n_heads)}"
            )
        return self


class ReaderState(NamedTuple):
    """State of a layer that reads the keys and values of an earlier layer, which has the cache."""

    length: Int[Tensor, " N"]
    """Number of tokens read, per row."""


class ConvolvedCache(NamedTuple):
    """State of a layer with a short convolution before its attention."""

    cache: Cache
    """KV cache."""
    recent: Float[Tensor, "B W-1 C"]
    """Last inputs of the short convolution, oldest first."""

    @property
    def length(self) -> Int[Tensor, " B"]:
        """Number of tokens read, per row."""
        return self.cache.length


CachedState: TypeAlias = Cache | ReaderState | ConvolvedCache


def with_recent(cache: Cache | None, recent: Float[Tensor, "B W-1 C"] | None) -> Cache | ConvolvedCache | None:
    """Return the state of a cache, and of the short convolution if there is one."""
    return cache if cache is None or recent is None else ConvolvedCache(cache, recent)


class CachedMixer(SequenceMixer[CachedState]):
    """A mixer with a KV cache: a ring buffer if `window` or `max_length` bounds its size, else a growing cache.

    Args:
        config: the mixer's configuration, which has a field `window` (or the class overrides `cache_window`).
    """

    supports_context_parallel = True
    forget_heads: int | None = None
    """Number of heads with forget gates; None without forget gates."""
    score_factor: float = 1.0
    """Factor by which scores are multiplied in addition to 1/sqrt(K); 1 unless muP sets it (`scale_like`)."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        self.config: Any = config
        self.convolution: ShortConvolution | None = None
        """Short convolution whose state the mixer has beside the cache."""

    @property
    def cache_window(self) -> int | None:
        """Number of tokens that the cache holds; None for all."""
        return self.config.window

    @property
    @abstractmethod
    def cache_sizes(self) -> tuple[int, int, int]:
        """Sizes of the KV cache: number of heads, width of a key, width of a value."""

    @property
    @abstractmethod
    def score_width(self) -> int:
        """Width K of queries and keys."""

    @property
    def score_scale(self) -> float:
        """Number that products of queries and keys are multiplied by."""
        return self.score_factor * self.score_width**-0.5

    def scale_like(self, base: Any) -> None:
        super().scale_like(base)
        self.score_factor = (base.score_width / self.score_width) ** 0.5

    def stored(self, cache: Cache) -> Cache:
        """Return a cache in the dtypes in which it is kept: under autocast, an op returns narrower ones."""
        return cast_cache(cache, self.dtype)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> CachedState:
        if self.takes_shared_kv:
            return ReaderState(torch.zeros(batch_size, dtype=torch.int64, device=self.device))
        cache_type, capacity = self._cache_type(max_length, 0)
        cache = empty_cache(cache_type, batch_size, capacity, self.cache_sizes, self._tensor(), self.forget_heads)
        cache = self.stored(cache)
        return cache if self.convolution is None else ConvolvedCache(cache, self.convolution.init_state(batch_size))

    def resize_state(self, state: CachedState, max_length: int | None) -> CachedState:
        if isinstance(state, ConvolvedCache):
            return state._replace(cache=self.resize_state(state.cache, max_length))
        processed = int(state.length.max())
        require_capacity(processed, max_length, self.kind)
        if isinstance(state, ReaderState):
            return state
        return resize_cache(state, *self._cache_type(max_length, min(processed, key_cache(state).keys.shape[1])))

    def rollback(
        self, x: Any, before: CachedState | None, after: CachedState, tokens: Any, **options: Any
    ) -> CachedState:
        if isinstance(after, ReaderState):
            kept_tokens(x, tokens, options.get("cu_seqlens"), self.kind)
            return ReaderState(after.length - torch.as_tensor(tokens, device=after.length.device))
        # a window's cache has overwritten keys that are in the window again; a convolution has lost earlier inputs
        if self.cache_window is not None or isinstance(after, ConvolvedCache):
            return super().rollback(x, before, after, tokens, **options)
        kept_tokens(x, tokens, options.get("cu_seqlens"), self.kind)
        return drop_last(after, torch.as_tensor(tokens, device=after.length.device))

    def _cache_type(self, max_length: int | None, slots: int) -> tuple[type[RingCache] | type[GrowingCache], int]:
        """Return the type of the cache and its number of slots.

        A ring buffer if `window` or `max_length` bounds the size, else a growing cache with `slots` slots.
        """
        bounds = [bound for bound in (self.cache_window, max_length) if bound is not None]
        return RingCache if bounds else GrowingCache, min(bounds, default=slots)

    def cache_slots(self, context: int) -> int:
        """Return the number of cache slots after a prefix of `context` tokens."""
        return 0 if context == 0 else context if self.cache_window is None else self.cache_window
