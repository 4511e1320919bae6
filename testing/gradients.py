"""Gradients by name."""

from collections.abc import Mapping

import torch
from torch import Tensor


def gradients(
    outputs: Mapping[str, Tensor], above: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients by name of the input; zero where nothing depends on it.

    Args:
        outputs: what is differentiated.
        above: the gradients from above, of some of the outputs.
        inputs: leaves of the graph.
    """
    roots = [name for name in above if outputs[name].requires_grad]
    if not roots:
        return {name: torch.zeros_like(x) for name, x in inputs.items()}
    found = torch.autograd.grad(
        [outputs[name] for name in roots],
        list(inputs.values()),
        [above[name].to(outputs[name].dtype) for name in roots],
        materialize_grads=True,
    )
    return dict(zip(inputs, found, strict=True))
