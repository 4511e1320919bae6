"""The contract: the checks that run by default. Importing a module registers its checks, in this order."""

# ruff: noqa: F401, I001
from . import equations, gradients, packing, batch
from . import states, values, positions, numerics, determinism
from . import declarations, compiling
