"""What a compiler should not fuse."""

import torch
from torch import Tensor


def materialize(x: Tensor, dim: int) -> Tensor:
    """x itself, which compiled code computes once instead of inlining it into every use.

    Inductor inlines what is elementwise into each place that reads it, however often that is: the logarithm of a decay
    for every entry of a state, twenty thousand times per token and layer. It writes concatenations to memory. x is a
    small tensor from expensive functions, `dim` a dimension of more than one entry, or nothing changes.
    """
    return written(x, dim) if torch.compiler.is_compiling() and x.shape[dim] > 1 else x


def written(x: Tensor, dim: int) -> Tensor:
    """A copy that compiled code writes to memory; `dim` has more than one entry."""
    return torch.cat((x.narrow(dim, 0, 1), x.narrow(dim, 1, x.shape[dim] - 1)), dim)
