"""Softmax attention and its KV caches."""

from ...registry.deprecated import former_names
from .api import Backend, SoftmaxOptions, softmax_attention, softmax_flops
from .kv_cache import (
    Cache,
    ForgettingCache,
    GrowingCache,
    KeyCache,
    RingCache,
    SharedKV,
    cast_cache,
    drop_last,
    empty_cache,
    final_cache,
    key_cache,
    resize_cache,
)

__all__ = [
    "Backend",
    "Cache",
    "ForgettingCache",
    "GrowingCache",
    "KeyCache",
    "RingCache",
    "SharedKV",
    "SoftmaxOptions",
    "cast_cache",
    "drop_last",
    "empty_cache",
    "final_cache",
    "key_cache",
    "resize_cache",
    "softmax_attention",
    "softmax_flops",
]
__getattr__ = former_names(
    __name__, {"softmax": "softmax_attention", "moved": "resize_cache", "stored_as": "cast_cache"}
)
