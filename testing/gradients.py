"""Gradients by name."""

from collections.abc import Mapping

import torch
from torch import Tensor


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
