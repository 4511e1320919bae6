"""Products of groups of rows, each with a matrix of its own: y_m = x_m W_e for the rows m of group e.

Notation: M rows, sorted by group, E groups, D and H the widths; group e is the rows ends[e - 1] to ends[e] - 1, and may
be empty. One node of a compiler's graph, whatever the groups' sizes are. In bfloat16 it is torch's grouped product,
which wants aligned widths; else a product per group.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .runtime.custom_op import Gradients, Op

ALIGNED = 8
"""Widths of bfloat16 that torch's grouped product takes are multiples of this."""


class _Grouped(NamedTuple):
    x: Tensor
    weight: Tensor
    ends: Tensor

    @property
    def at_once(self) -> bool:
        widths = self.weight.shape[1:]
        return self.x.dtype == torch.bfloat16 and all(width % ALIGNED == 0 for width in widths)

    def groups(self) -> Iterator[tuple[int, slice]]:
        start = 0
        for group, stop in enumerate(self.ends.tolist()):
            yield group, slice(start, stop)
            start = stop


def grouped_linear(
    x: Float[Tensor, "M D"], weight: Float[Tensor, "E D H"], ends: Int[Tensor, " E"]
) -> Float[Tensor, "M H"]:
    """The products of rows, sorted by group, and each group's matrix, of their dtype; `ends` is the row after its
    last."""
    return _OP(_Grouped(x, weight, ends))[0]


def _allocate(x: _Grouped) -> tuple[Tensor]:
    return (x.x.new_empty(x.x.shape[0], x.weight.shape[2]),)


def _forward(x: _Grouped) -> tuple[Tensor]:
    if x.at_once:
        return (F.grouped_mm(x.x, x.weight, offs=x.ends),)
    (y,) = _allocate(x)
    for group, rows in x.groups():
        torch.mm(x.x[rows], x.weight[group], out=y[rows])
    return (y,)


def _backward(x: _Grouped, gradients: Gradients) -> dict[str, Tensor]:
    (d_y,) = gradients.outputs
    assert d_y is not None
    d_y = d_y.contiguous()
    if x.at_once:
        d_x = F.grouped_mm(d_y, x.weight.mT, offs=x.ends)
        return {"x": d_x, "weight": F.grouped_mm(x.x.mT, d_y, offs=x.ends)}
    d_x = torch.empty_like(x.x)
    d_weight = torch.empty_like(x.weight)
    for group, rows in x.groups():
        torch.mm(d_y[rows], x.weight[group].mT, out=d_x[rows])
        torch.mm(x.x[rows].mT, d_y[rows], out=d_weight[group])
    return {"x": d_x, "weight": d_weight}


_OP = Op("grouped_linear", _Grouped, fake=_allocate, forward=_forward, backward=_backward, outputs=1)
