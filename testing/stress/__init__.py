"""Checks that run under `--stress` alone. Importing a module registers its checks, in this order."""

# ruff: noqa: F401, I001
from . import long_sequences, parameters, precision, surroundings, graphs
