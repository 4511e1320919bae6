"""Base of the adapters of torch functions: arrays become tensors and back; autograd computes the gradients."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np
import torch

Arrays = Mapping[str, np.ndarray]


def on_tensors(
    function: Callable[..., Mapping[str, torch.Tensor]], without: tuple[str, ...] = (), differentiable: bool = True
) -> Callable[..., dict[str, np.ndarray]]:
    """Return a function on arrays, with gradients, of one on tensors: function(inputs, attributes) -> results.

    Args:
        function: the function on tensors.
        without: inputs whose gradients are left out of the result.
        differentiable: False if the function has no gradients.
    """

    @wraps(function)
    def on_arrays(inputs: Arrays, attributes: dict[str, Any], cotangents: Arrays) -> dict[str, np.ndarray]:
        tensors = {name: torch.from_numpy(x.copy()) for name, x in inputs.items()}
        wanted = differentiable and bool(cotangents)
        leaves = {name: x for name, x in tensors.items() if x.is_floating_point() and wanted}
        for x in leaves.values():
            x.requires_grad_()
        results = dict(function(tensors, attributes))
        arrays = {name: x.detach().numpy() for name, x in results.items()}
        roots = {name: results[name] for name in cotangents if name in results and results[name].requires_grad}
        if not roots or len(roots) < len(cotangents):
            return arrays
        upstream = [torch.from_numpy(cotangents[name].copy()).to(x) for name, x in roots.items()]
        gradients = torch.autograd.grad([*roots.values()], [*leaves.values()], upstream, materialize_grads=True)
        named = dict(zip(leaves, gradients, strict=True))
        return arrays | {f"gradient.{name}": x.numpy() for name, x in named.items() if name not in without}

    return on_arrays


def require_none(inputs: Mapping[str, Any], *names: str) -> None:
    """Raise NotImplementedError if a call has one of these inputs or attributes."""
    for name in names:
        if name in inputs:
            raise NotImplementedError(f"no {name}")


def pad_tokens(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Return x [B T ...] with zeros after its tokens, up to a multiple: they write nothing and forget nothing."""
    missing = -x.shape[1] % multiple
    return torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), dim=1)


def decay_per_token(x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the log-decays of a call as [B T H]; zeros if it has none. One that has a key dimension is not offered."""
    a = x.get("log_decay", x["v"].new_zeros(x["v"].shape[2]))
    if a.ndim == 4:
        raise NotImplementedError("no log-decays per key dimension")
    return a.expand(*x["v"].shape[:3]) if a.ndim == 1 else a


def decay_per_key(x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the log-decays of a call as [B T H K]; zeros if it has none."""
    a = x.get("log_decay")
    if a is not None and a.ndim == 4:
        return a
    return decay_per_token(x)[..., None].expand(*x["v"].shape[:3], x["k"].shape[3])


def require_no_groups(x: Mapping[str, torch.Tensor]) -> None:
    """Raise NotImplementedError if several value heads share a key head."""
    if x["k"].shape[2] != x["v"].shape[2]:
        raise NotImplementedError("no grouped heads")
