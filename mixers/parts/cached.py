"""Mixers of the softmax family: their state is a KV cache."""

from abc import abstractmethod
from typing import Any

from ...ops.attention import Cache, GrowingCache, RingCache, empty_cache, key_cache, moved
from ..contract import MixerConfig, SequenceMixer
from ..traits import require_room


class CachedMixer(SequenceMixer[Cache]):
    """A mixer with a KV cache: a ring buffer under a window or with max_length, else a growing cache.

    Args:
        config: the mixer's configuration, with a `window`.
    """

    supports_context_parallel = True
    forget_heads: int | None = None
    """Heads that have forget gates; None where there are none."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        self.config: Any = config

    @property
    @abstractmethod
    def cache_sizes(self) -> tuple[int, int, int]:
        """Heads of the cache, and the widths of their keys and values."""

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> Cache:
        kind, capacity = self._room(max_length, 0)
        return empty_cache(kind, batch_size, capacity, self.cache_sizes, self._tensor(), self.forget_heads)

    def resize_state(self, state: Cache, max_length: int | None) -> Cache:
        read = int(state.length.max())
        require_room(read, max_length, self.kind)
        return moved(state, *self._room(max_length, min(read, key_cache(state).keys.shape[1])))

    def _room(self, max_length: int | None, used: int) -> tuple[type[RingCache] | type[GrowingCache], int]:
        """The kind of a cache and its slots: a ring buffer where something bounds it, else as many as are used."""
        bounds = [bound for bound in (self.config.window, max_length) if bound is not None]
        return RingCache if bounds else GrowingCache, min(bounds, default=used)

    def cached(self, context: int) -> int:
        """The slots of the cache after so many tokens."""
        return 0 if context == 0 else context if self.config.window is None else self.config.window
