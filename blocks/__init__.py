"""Blocks: layers made of a mixer, a feed-forward network, norms and residual connections."""

from .block import Block, BlockConfig
from .dropout import Dropout
from .ffn import FFNS, FeedForward, FfnConfig
from .norm import NORMS, NormConfig
from .residual import RESIDUALS, Residual, ResidualConfig, ResidualEnds

__all__ = [
    "FFNS",
    "NORMS",
    "RESIDUALS",
    "Block",
    "BlockConfig",
    "Dropout",
    "FeedForward",
    "FfnConfig",
    "NormConfig",
    "Residual",
    "ResidualConfig",
    "ResidualEnds",
]
