"""A barrier against inlining in compiled code."""

import torch
from torch import Tensor


def materialize(x: Tensor, dim: int) -> Tensor:
    """Return x, which compiled code then computes once instead of inlining it into every use.

    Inductor inlines elementwise operations into each place that reads their result, however often that is: the
    logarithm of a decay is computed for every entry of a state, twenty thousand times per token and layer. Inductor
    writes concatenations to memory, so compiled code gets a concatenation.

    Args:
        x: a small tensor that is expensive to compute.
        dim: a dimension with more than one entry; with a single entry, nothing changes.
    """
    return write_to_memory(x, dim) if torch.compiler.is_compiling() and x.shape[dim] > 1 else x


def write_to_memory(x: Tensor, dim: int) -> Tensor:
    """Return a copy that compiled code writes to memory; dimension `dim` must have more than one entry."""
    return torch.cat((x.narrow(dim, 0, 1), x.narrow(dim, 1, x.shape[dim] - 1)), dim)
