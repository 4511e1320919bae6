"""What adapters of torch functions share: arrays become tensors and back, and autograd computes the gradients."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np
import torch

Arrays = Mapping[str, np.ndarray]


def on_tensors(function: Callable[..., Mapping[str, torch.Tensor]]) -> Callable[..., dict[str, np.ndarray]]:
    """Return a function on arrays, with gradients, of one on tensors: function(inputs, attributes) -> results.

    If autograd cannot compute the gradients, they are left out of the result.
    """

    @wraps(function)
    def on_arrays(inputs: Arrays, attributes: dict[str, Any], cotangents: Arrays) -> dict[str, np.ndarray]:
        tensors = {name: torch.from_numpy(x.copy()) for name, x in inputs.items()}
        leaves = {name: x for name, x in tensors.items() if x.is_floating_point() and cotangents}
        for x in leaves.values():
            x.requires_grad_()
        results = dict(function(tensors, attributes))
        arrays = {name: x.detach().to(torch.float64).numpy() for name, x in results.items()}
        roots = {name: results[name] for name in cotangents if name in results and results[name].requires_grad}
        if not roots or len(roots) < len(cotangents):
            return arrays
        upstream = [torch.from_numpy(cotangents[name].copy()).to(x) for name, x in roots.items()]
        gradients = torch.autograd.grad([*roots.values()], [*leaves.values()], upstream, materialize_grads=True)
        return arrays | {f"gradient.{name}": x.numpy() for name, x in zip(leaves, gradients, strict=True)}

    return on_arrays


def require_none(inputs: Mapping[str, Any], *names: str) -> None:
    """Raise NotImplementedError if a call has one of these inputs or attributes."""
    for name in names:
        if name in inputs:
            raise NotImplementedError(f"no {name}")
