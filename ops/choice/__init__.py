"""Attention to chosen keys: the best blocks (MoBA, NSA), or the best tokens by an indexer (DSA)."""

from .api import block_attention, choice_flops, index_attention, native_sparse_attention
from .tokens import Index

__all__ = [
    "Index",
    "block_attention",
    "choice_flops",
    "index_attention",
    "native_sparse_attention",
]
