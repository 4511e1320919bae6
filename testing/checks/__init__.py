"""The checks, one file a subject; importing a file registers its checks, in this order."""

from . import sequence  # noqa: I001
from . import packing, batch, states, positions, numerics, declarations, compiling
from . import kernels

__all__ = ["batch", "compiling", "declarations", "kernels", "numerics", "packing", "positions", "sequence", "states"]
