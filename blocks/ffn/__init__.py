"""Feed-forward networks: what one is, and one file a kind."""

from .feed_forward import FFNS, FeedForward, FfnConfig

__all__ = ["FFNS", "FeedForward", "FfnConfig"]
