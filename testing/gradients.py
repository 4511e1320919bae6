"""Gradients by name."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Layout = Callable[[Tensor], Tensor]
"""The same numbers, as they lie in memory another way."""


class _LaidOut(torch.autograd.Function):
    """The identity, whose gradient lies in memory another way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None]:
        return ctx.layout(above[0]), None


def with_gradient_laid_out(x: Tensor, layout: Layout) -> Tensor:
    """The same tensor; its gradient arrives in this layout where nothing else reads x.

    Slices of a stack do not do: autograd adds up their gradients, and the sum is contiguous.
    """
    return _LaidOut.apply(x, layout) if x.requires_grad else x


def strided(x: Tensor) -> Tensor:
    """The same numbers with other strides: the last dimension is not the innermost, and neighbours are two apart."""
    if x.ndim < 2:
        return torch.stack((x, x), dim=-1)[..., 0]
    return torch.stack((x, x), dim=-1).transpose(-3, -2).contiguous().transpose(-3, -2)[..., 0]


def time_first(x: Tensor) -> Tensor:
    """The same numbers, in memory as [T B ...]."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def gradients(
    outputs: Mapping[str, Tensor],
    above: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> dict[str, Tensor]:
    """Gradients by name of the input, a leaf, from those above of some outputs; zero where nothing depends on it."""
    roots = {name: outputs[name] for name in above if outputs[name].requires_grad}
    if not roots or not inputs:
        return {name: torch.zeros_like(x) for name, x in inputs.items()}
    gradients = [above[name].to(root.dtype) for name, root in roots.items()]
    options = {"create_graph": create_graph, "retain_graph": create_graph or retain_graph, "materialize_grads": True}
    found = torch.autograd.grad([*roots.values()], [*inputs.values()], gradients, **options)
    return dict(zip(inputs, found, strict=True))
