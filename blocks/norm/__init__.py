"""Norms of the residual stream: what one is, and one file a kind."""

from .norm import NORMS, Norm, NormConfig

__all__ = ["NORMS", "Norm", "NormConfig"]
