"""Memory layouts of the tensors of a kernel case."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["contiguous", "fused", "heads_first", "sliced", "expanded", "mixed"]
"""Memory layout of a case's tensors.

- `contiguous`: all tensors are contiguous.
- `fused`: queries, keys and values are slices of one projection; other tensors are transposed.
- `heads_first`: the heads of queries, keys and values are stored before tokens; the second and third dimension of other
  tensors are exchanged.
- `sliced`: every tensor is a slice of a larger one, whose other elements are NaN.
- `expanded`: states and upstream gradients repeat one element along a dimension (stride 0), and all heads share the
  queries and keys of the first.
- `mixed`: queries, keys and values have different strides.
"""

LAYOUTS: tuple[Layout, ...] = ("contiguous", "fused", "heads_first", "sliced", "expanded", "mixed")


def laid_out(layout: Layout, name: str, x: Tensor, dim: int, *, per_token: bool) -> Tensor:
    """Return a tensor in a layout.

    Args:
        layout: the layout.
        name: the tensor's name; `mixed` depends on it.
        x: the tensor.
        dim: the dimension along which `expanded` repeats the first entry.
        per_token: True if the first two dimensions are batch and tokens.
    """
    if layout == "mixed":
        layout = "contiguous" if name == "q" else "heads_first" if name == "k" else "fused"
    if layout == "contiguous":
        return x.contiguous()
    if layout == "expanded":
        return x.narrow(dim, 0, 1).contiguous().expand_as(x)
    if layout == "sliced":
        return _slice_of_larger(x, 2 if per_token else min(1, x.ndim - 1))
    if x.ndim == 1:
        return x.repeat_interleave(2)[::2]
    if layout == "heads_first" and x.ndim > 2:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.mT.contiguous().mT


def laid_out_heads(layout: Layout, projected: Tensor, heads: Sequence[int], widths: Sequence[int]) -> dict[str, Tensor]:
    """Split a projection [B T *] into queries, keys and values with these numbers of heads and widths."""
    if layout == "sliced":
        projected = _slice_of_larger(projected, 2)
    sizes = [n * width for n, width in zip(heads, widths, strict=True)]
    split = zip("qkv", projected.split(sizes, dim=-1), heads, strict=True)
    tensors = {name: part.unflatten(-1, (n, -1)) for name, part, n in split}
    if layout in ("fused", "sliced"):
        return tensors
    if layout in ("heads_first", "mixed"):
        return {name: laid_out(layout, name, x, 0, per_token=True) for name, x in tensors.items()}
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    if layout == "expanded":
        tensors |= {name: tensors[name][:, :, :1].expand_as(tensors[name]) for name in "qk"}
    return tensors


def writable(x: Tensor) -> Tensor:
    """Return the part of x [B T H *] that can be written to: all of it, or one head if x is one head expanded to H."""
    return x if x.stride(2) else x[:, :, :1]


def spread(x: Tensor) -> Tensor:
    """Return the same numbers [N] with stride 2, as a column of a table [N 2] that has every number twice."""
    return torch.stack((x, x), dim=1)[:, 0]


def _slice_of_larger(x: Tensor, dim: int) -> Tensor:
    """Return the same numbers as a slice of a larger tensor, whose other elements are NaN (0 for integers).

    The larger tensor has more features, which are the dimensions from `dim` on.
    """
    features = x.flatten(dim) if x.ndim > dim + 1 else x
    filler = 0 if x.dtype == torch.int64 else torch.nan
    larger = x.new_full((*features.shape[:-1], features.shape[-1] + 3), filler)
    part = larger.narrow(-1, 1, features.shape[-1])
    part.copy_(features)
    return part.unflatten(dim, x.shape[dim:])
