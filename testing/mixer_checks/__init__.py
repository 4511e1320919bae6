"""The checks of mixers, one file a subject; importing a file registers its checks, in this order."""

# ruff: noqa: F401, I001
from . import sequence, long_sequences, gradients, packing, batch
from . import states, values, positions, numerics, determinism, surroundings
from . import declarations, transfer, first_values, context_parallel, compiling
