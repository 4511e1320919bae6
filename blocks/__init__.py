"""Blocks: layers made of a mixer, a feed-forward network and norms."""

from .block import Block, BlockConfig
from .dropout import Dropout
from .ffn import FFNS, FeedForward, FfnConfig
from .norm import NORMS, NormConfig

__all__ = ["FFNS", "NORMS", "Block", "BlockConfig", "Dropout", "FeedForward", "FfnConfig", "NormConfig"]
