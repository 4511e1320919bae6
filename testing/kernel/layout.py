"""How the tensors of a kernel case lie in memory."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["contiguous", "fused", "heads_first", "sliced", "expanded", "mixed"]
"""Fused: queries, keys and values are slices of one projection, the others transposed. Heads first: heads before
tokens, and of a state keys before heads. Sliced: every tensor is a slice of one with more features, and a state's rows
are parts of larger ones; what lies between is NaN. Expanded: rows of a state, and gradients from above, are one number
repeated, and heads share queries and keys. Mixed: queries, keys and values have different strides."""

LAYOUTS: tuple[Layout, ...] = ("contiguous", "fused", "heads_first", "sliced", "expanded", "mixed")


def laid_out(layout: Layout, name: str, x: Tensor, dim: int, *, per_token: bool) -> Tensor:
    """A tensor in a layout; the dimension is that along which it may be one number repeated."""
    if layout == "mixed":
        layout = "contiguous" if name == "q" else "heads_first" if name == "k" else "fused"
    if layout == "contiguous":
        return x.contiguous()
    if layout == "expanded":
        return x.narrow(dim, 0, 1).contiguous().expand_as(x)
    if layout == "sliced":
        return _slice_of_more(x, 2 if per_token else min(1, x.ndim - 1))
    if x.ndim == 1:
        return x.repeat_interleave(2)[::2]
    if layout == "heads_first" and x.ndim > 2:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.mT.contiguous().mT


def laid_out_heads(layout: Layout, projected: Tensor, heads: Sequence[int], widths: Sequence[int]) -> dict[str, Tensor]:
    """Queries, keys and values of one projection [B T *], with so many heads of such widths."""
    if layout == "sliced":
        projected = _slice_of_more(projected, 2)
    sizes = [n * width for n, width in zip(heads, widths, strict=True)]
    split = zip("qkv", projected.split(sizes, dim=-1), heads, strict=True)
    found = {name: part.unflatten(-1, (n, -1)) for name, part, n in split}
    if layout in ("fused", "sliced"):
        return found
    if layout in ("heads_first", "mixed"):
        return {name: laid_out(layout, name, x, 0, per_token=True) for name, x in found.items()}
    found = {name: x.contiguous() for name, x in found.items()}
    if layout == "expanded":
        found |= {name: found[name][:, :, :1].expand_as(found[name]) for name in "qk"}
    return found


def writable(x: Tensor) -> Tensor:
    """Heads [B T H *] without those that are the first's repeated."""
    return x if x.stride(2) else x[:, :, :1]


def spread(x: Tensor) -> Tensor:
    """The same numbers [N], as a column of a table that has each twice."""
    return torch.stack((x, x), dim=1)[:, 0]


def _slice_of_more(x: Tensor, dim: int) -> Tensor:
    """The same numbers as a slice of a tensor with more features, those from `dim` on, whose other numbers are NaN."""
    features = x.flatten(dim) if x.ndim > dim + 1 else x
    others = 0 if x.dtype == torch.int64 else torch.nan
    more = x.new_full((*features.shape[:-1], features.shape[-1] + 3), others)
    found = more.narrow(-1, 1, features.shape[-1])
    found.copy_(features)
    return found.unflatten(dim, x.shape[dim:])
