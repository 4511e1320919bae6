"""The softmax family: attention."""

from .api import Backend, softmax, softmax_attention, softmax_flops
from .cache import Cache, GrowingCache, RingCache, empty_cache, moved

__all__ = [
    "Backend",
    "Cache",
    "GrowingCache",
    "RingCache",
    "empty_cache",
    "moved",
    "softmax",
    "softmax_attention",
    "softmax_flops",
]
