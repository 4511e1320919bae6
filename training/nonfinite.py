"""Locate where NaN or infinity first appeared: the first module in forward, the first parameter in backward.

Such values spread to other tokens of a row, and to other documents packed into it, because masked products add 0 * NaN.
In the output of the first module they have spread least, so the first affected token there is reported too.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..registry import SeqmixError
from .distributed.sharding import local_tensor


class NotFiniteError(SeqmixError):
    """A loss or a gradient is NaN or infinite; the message says which, and where that began."""

    exit_status = 4


class Place(NamedTuple):
    """The first module whose value (an output or its gradient) is not finite, and the tokens affected."""

    module: str
    """Dotted name of the module, followed by the name of its first parameter that is not finite, if any."""
    call: int = 0
    """Index of the call of the model, from 0."""
    tokens: Tensor | None = None
    """Boolean mask [B, T], True for non-finite tokens. None if they are unknown, or if they are all tokens of the first
    call, which locates nothing."""
    backward: bool = False
    """True for a gradient, where NaN and infinity spread to earlier tokens."""


def first_module(model: nn.Module, calls: Callable[[], Iterable[object]], *, backward: bool = False) -> Place | None:
    """Find the innermost module in whose output NaN or infinity first appears; None if all outputs are finite.

    The model runs again with hooks, in eager mode, as compiled code has no hooks.

    Args:
        model: the model.
        calls: returns an iterable; each iteration calls the model once, and runs the backward pass too if `backward`.
        backward: True to watch the gradients of the outputs instead of the outputs.
    """
    places: list[Place] = []
    finished = 0
    names = {module: name or "the model" for name, module in model.named_modules()}

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001 torch's signature
        value = output[0] if isinstance(output, tuple) else output
        if module not in names or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        if not backward:
            inspect(module, value)
        elif value.requires_grad:
            value.register_hook(lambda gradient: inspect(module, gradient))

    def inspect(module: nn.Module, value: Tensor) -> None:
        if not places and not (finite := local_tensor(value).isfinite()).all():
            bad = [name for name, p in module.named_parameters(recurse=False) if not local_tensor(p).isfinite().all()]
            parameter = f", whose {bad[0]} is not finite" if bad else ""
            tokens = ~finite.flatten(2).all(2) if finite.ndim > 2 else None
            is_informative = tokens is not None and (finished or not tokens.all())
            places.append(Place(names[module] + parameter, finished, tokens if is_informative else None, backward))

    eager = torch.compiler.set_stance("force_eager")
    hooks = register_module_forward_hook(watch)
    with hooks, eager, torch.set_grad_enabled(backward):
        for _ in calls():  # to the end, as the calls are collective
            finished += 1
    return places[0] if places else None


def first_gradient(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """Return the name of the first parameter in backward order whose gradient is not finite; None if all are finite."""
    in_backward_order = reversed(list(parameters))
    return next(
        (name for name, p in in_backward_order if p.grad is not None and not local_tensor(p.grad).isfinite().all()),
        None,
    )
