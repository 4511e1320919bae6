"""Gradients by name, and tensors with other memory layouts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Layout = Callable[[Tensor], Tensor]
"""Function that returns a tensor with the same numbers and another memory layout."""


class _GradientLayout(torch.autograd.Function):
    """The identity, whose backward pass returns the gradient in another memory layout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.layout(upstream[0]), None


def with_gradient_layout(x: Tensor, layout: Layout) -> Tensor:
    """Return a view of x whose gradient arrives at x in this memory layout, if x has no other use.

    A slice of a stacked tensor does not achieve this: autograd adds up the gradients of slices in a contiguous tensor.
    """
    return _GradientLayout.apply(x, layout) if x.requires_grad else x


def strided(x: Tensor) -> Tensor:
    """Return the same numbers with other strides: the last dimension is not innermost, and neighbours are two apart."""
    if x.ndim < 2:
        return torch.stack((x, x), dim=-1)[..., 0]
    return torch.stack((x, x), dim=-1).transpose(-3, -2).contiguous().transpose(-3, -2)[..., 0]


def time_first(x: Tensor) -> Tensor:
    """Return the same tensor [B T ...], which lies in memory as [T B ...]."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def gradients(
    outputs: Mapping[str, Tensor],
    upstream: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> dict[str, Tensor]:
    """Return gradients by name of the input; zero for an input that no output depends on.

    Args:
        outputs: outputs by name.
        upstream: upstream gradients by name of an output; outputs that are left out are not differentiated.
        inputs: leaves of the graph by name.
        create_graph: True if the gradients are to be differentiated again.
        retain_graph: True to keep the graph for another backward pass.
    """
    roots = {name: outputs[name] for name in upstream if outputs[name].requires_grad}
    if not roots or not inputs:
        return {name: torch.zeros_like(x) for name, x in inputs.items()}
    computed = torch.autograd.grad(
        [*roots.values()],
        [*inputs.values()],
        [upstream[name].to(root.dtype) for name, root in roots.items()],
        create_graph=create_graph,
        retain_graph=create_graph or retain_graph,
        materialize_grads=True,
    )
    return dict(zip(inputs, computed, strict=True))
