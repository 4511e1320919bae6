"""Matrix products of row groups, one weight matrix per group: y_m = x_m W_e for the rows m of group e.

Notation: M rows sorted by group, E groups, D input width, H output width. Group e has the rows ends[e - 1] to
ends[e] - 1 and may be empty. The op is one node of a compiled graph, whatever the group sizes are. In bfloat16 with
aligned widths it calls torch's grouped product; otherwise it computes one product per group.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .runtime.custom_op import Gradients, Op

WIDTH_MULTIPLE = 8
"""Torch's grouped product in bfloat16 requires widths that are multiples of this."""


class _Grouped(NamedTuple):
    x: Tensor
    weight: Tensor
    ends: Tensor

    @property
    def uses_grouped_product(self) -> bool:
        widths = self.weight.shape[1:]
        return self.x.dtype == torch.bfloat16 and all(width % WIDTH_MULTIPLE == 0 for width in widths)

    def row_ranges(self) -> Iterator[tuple[int, slice]]:
        start = 0
        for group, stop in enumerate(self.ends.tolist()):
            yield group, slice(start, stop)
            start = stop


def grouped_linear(
    x: Float[Tensor, "M D"], weight: Float[Tensor, "E D H"], ends: Int[Tensor, " E"]
) -> Float[Tensor, "M H"]:
    """Multiply the rows of each group with the group's matrix.

    Args:
        x: rows, sorted by group.
        weight: one matrix per group, in the dtype of x.
        ends: for each group the index after its last row, in ascending order.

    Returns:
        The products, in the dtype of x.
    """
    return OP(_Grouped(x, weight, ends))[0]


def _allocate(x: _Grouped) -> tuple[Tensor]:
    return (x.x.new_empty(x.x.shape[0], x.weight.shape[2]),)


def _forward(x: _Grouped) -> tuple[Tensor]:
    if x.uses_grouped_product:
        return (F.grouped_mm(x.x, x.weight, offs=x.ends),)
    (y,) = _allocate(x)
    for group, rows in x.row_ranges():
        torch.mm(x.x[rows], x.weight[group], out=y[rows])
    return (y,)


def _backward(x: _Grouped, gradients: Gradients) -> dict[str, Tensor]:
    (d_y,) = gradients.outputs
    assert d_y is not None
    d_y = d_y.contiguous()
    if x.uses_grouped_product:
        d_x = F.grouped_mm(d_y, x.weight.mT, offs=x.ends)
        return {"x": d_x, "weight": F.grouped_mm(x.x.mT, d_y, offs=x.ends)}
    d_x = torch.empty_like(x.x)
    d_weight = torch.empty_like(x.weight)
    for group, rows in x.row_ranges():
        torch.mm(d_y[rows], x.weight[group].mT, out=d_x[rows])
        torch.mm(x.x[rows].mT, d_y[rows], out=d_weight[group])
    return {"x": d_x, "weight": d_weight}


OP = Op("grouped_linear", _Grouped, fake=_allocate, forward=_forward, backward=_backward, outputs=1)
