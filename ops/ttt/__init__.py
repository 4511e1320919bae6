"""Test-time training: a memory that is a small network, trained on the tokens while it reads them."""

from .api import TTT_PARADIGMS, FastLayer, TTTOutput, ttt, ttt_flops
from .network import Norm
from .titans import MomentumLayer, TitansOutput, titans, titans_flops

__all__ = [
    "TTT_PARADIGMS",
    "FastLayer",
    "MomentumLayer",
    "Norm",
    "TTTOutput",
    "TitansOutput",
    "titans",
    "titans_flops",
    "ttt",
    "ttt_flops",
]
