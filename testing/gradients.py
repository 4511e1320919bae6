"""Gradients by name, of what a mixer learns and of what it is given."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..mixers.contract import SequenceMixer
from .trial import as_leaves, float_leaves


def learnable(mixer: SequenceMixer[Any]) -> dict[str, Tensor]:
    """The parameters that are not frozen."""
    return {name: parameter for name, parameter in mixer.named_parameters() if parameter.requires_grad}


def results_and_gradients(
    mixer: SequenceMixer[Any],
    function: Callable[[Tensor, Any], tuple[Tensor, Any]],
    x: Tensor,
    state: Any,
    above: Callable[[str, Tensor], Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and float leaves of the final state, and the gradients of input, state and parameters.

    Args:
        mixer: whose parameters.
        function: gives output and final state of `x` and `state`.
        x: the segment.
        state: what comes before.
        above: the gradient from above of a result, by its name.
    """
    x, state = x.detach().requires_grad_(), as_leaves(state)
    y, after = function(x, state)
    results = {"the output": y} | {f"the final state's {name}": leaf for name, leaf in float_leaves(after).items()}
    leaves = {"the input": x} | {f"the state's {name}": leaf for name, leaf in float_leaves(state).items()}
    leaves |= learnable(mixer)
    roots = {name: result for name, result in results.items() if result.requires_grad}
    gradients = torch.autograd.grad(
        list(roots.values()),
        list(leaves.values()),
        [above(name, root.detach()) for name, root in roots.items()],
        materialize_grads=True,
    )
    named = {f"the gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: result.detach() for name, result in results.items()}, named


def noise_from_above(seed: int, dtype: torch.dtype, like: Mapping[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
    """Gradients from above that are the same rounded numbers in every dtype.

    Args:
        seed: they are a function of it.
        dtype: they are rounded to it.
        like: the leaves of the final state; where they are zero, so are the gradients. Those are the empty slots of a
            cache, and nothing can depend on what they hold.
    """

    def above(name: str, result: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 1 + len(name))
        noise = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(dtype)
        noise = noise.to(result.device, result.dtype)
        leaf = name.removeprefix("the final state's ")
        return noise if leaf not in like else noise * (like[leaf] != 0)

    return above
