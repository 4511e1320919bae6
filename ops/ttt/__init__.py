"""Test-time training: a memory that is a small network, trained on the tokens while it reads them."""

from .api import TTT_PARADIGMS, FastLayer, Norm, TTTOutput, ttt, ttt_flops

__all__ = ["TTT_PARADIGMS", "FastLayer", "Norm", "TTTOutput", "ttt", "ttt_flops"]
