"""Blocks: how a mixer, a feed-forward network and norms make a layer."""

from .block import Block, BlockConfig
from .ffn import FFNS, FeedForward, FfnConfig
from .norm import NORMS, NormConfig

__all__ = ["FFNS", "NORMS", "Block", "BlockConfig", "FeedForward", "FfnConfig", "NormConfig"]
