"""Attention to chosen keys: the best blocks (MoBA, NSA), or the best tokens by an indexer (DSA)."""

from ...registry.deprecated import former_names
from .api import block_attention, index_attention, native_sparse_attention, sparse_flops
from .tokens import Index

__all__ = [
    "Index",
    "block_attention",
    "index_attention",
    "native_sparse_attention",
    "sparse_flops",
]
__getattr__ = former_names(__name__, {"choice_flops": "sparse_flops"})
