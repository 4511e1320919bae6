"""Where NaN or infinity first appeared: the first module in forward, the first parameter in backward.

Tokens of a row, and documents that are packed into one, may get such numbers from each other, since masked products add
0 * NaN. In the output of the first module they have spread least, and so the first token that has them is named too.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..registry import SeqmixError
from .distributed.sharding import local_tensor


class NotFiniteError(SeqmixError):
    """A loss or a gradient is NaN or infinite: which, and where that began."""


class Place(NamedTuple):
    """Where numbers are first not finite in forward, or in backward."""

    module: str
    call: int = 0
    """In which of the calls."""
    tokens: Tensor | None = None
    """Which entries of the value's first two dimensions are not finite; None if all are, from the beginning on."""
    backward: bool = False
    """Whether the value is a gradient, where numbers spread to tokens before."""


def first_module(model: nn.Module, calls: Callable[[], Iterable[object]], *, backward: bool = False) -> Place | None:
    """The innermost module that first returns a value that is not finite; None if all values are finite.

    Iterating over `calls()` calls the model that returned such a value; it runs again in eager mode, as compiled code
    has no hooks. With `backward` it calls backward too, and values are the gradients of what modules return.
    """
    found: list[Place] = []
    done = 0
    names = {module: name or "the model" for name, module in model.named_modules()}

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001 torch's signature
        value = output[0] if isinstance(output, tuple) else output
        if module not in names or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        if not backward:
            look(module, value)
        elif value.requires_grad:
            value.register_hook(lambda gradient: look(module, gradient))

    def look(module: nn.Module, value: Tensor) -> None:
        if not found and not (finite := local_tensor(value).isfinite()).all():
            bad = [name for name, p in module.named_parameters(recurse=False) if not local_tensor(p).isfinite().all()]
            at_fault = f", whose {bad[0]} is not finite" if bad else ""
            tokens = ~finite.flatten(2).all(2) if finite.ndim > 2 else None
            some = tokens is not None and (done or not tokens.all())
            found.append(Place(names[module] + at_fault, done, tokens if some else None, backward))

    eager = torch.compiler.set_stance("force_eager")
    hooks = register_module_forward_hook(watch)
    with hooks, eager, torch.set_grad_enabled(backward):
        for _ in calls():  # to the end: processes call each other in it
            done += 1
    return found[0] if found else None


def first_gradient(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """The first parameter in backward order whose gradient is not finite; None if all are finite."""
    named = reversed(list(parameters))
    return next((name for name, p in named if p.grad is not None and not local_tensor(p.grad).isfinite().all()), None)
