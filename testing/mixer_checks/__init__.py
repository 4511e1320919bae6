"""The checks of mixers, one file a subject; importing a file registers its checks, in this order."""

from . import sequence  # noqa: I001
from . import packing, batch, states, positions, numerics, declarations, compiling

__all__ = ["batch", "compiling", "declarations", "numerics", "packing", "positions", "sequence", "states"]
