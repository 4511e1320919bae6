"""The checks of mixers, one file a subject; importing a file registers its checks, in this order."""

from . import sequence, gradients, packing, batch, states, values, positions, numerics, declarations, compiling  # noqa: F401, I001
