"""Softmax attention and its KV caches."""

from ...registry.moved import former_names
from .api import Backend, SoftmaxOptions, softmax_attention, softmax_flops
from .kv_cache import (
    Cache,
    ForgettingCache,
    GrowingCache,
    KeyCache,
    RingCache,
    empty_cache,
    final_cache,
    key_cache,
    moved,
    stored_as,
)

__all__ = [
    "Backend",
    "Cache",
    "ForgettingCache",
    "GrowingCache",
    "KeyCache",
    "RingCache",
    "SoftmaxOptions",
    "empty_cache",
    "final_cache",
    "key_cache",
    "moved",
    "softmax_attention",
    "softmax_flops",
    "stored_as",
]
__getattr__ = former_names(__name__, {"softmax": "softmax_attention"})
