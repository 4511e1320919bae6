"""Where NaN or infinity first appeared: the first module in forward, the first parameter in backward."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..registry import SeqmixError
from .sharding import local_tensor


class NotFiniteError(SeqmixError):
    """A loss or a gradient is NaN or infinite: which, and where that began."""


@torch.no_grad()
def first_module(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The innermost module that first returns a value that is not finite, as text; None if all values are finite.

    `forward` calls the model that returned such a value; it runs again in eager mode, as compiled code has no hooks.
    """
    found: list[str] = []
    names = {module: name or "the model" for name, module in model.named_modules()}

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001 torch's signature
        value = output[0] if isinstance(output, tuple) else output
        if found or module not in names or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        if not local_tensor(value).isfinite().all():
            bad = [name for name, p in module.named_parameters(recurse=False) if not local_tensor(p).isfinite().all()]
            found.append(names[module] + (f", whose {bad[0]} is not finite" if bad else ""))

    with register_module_forward_hook(watch), torch.compiler.set_stance("force_eager"):
        forward()
    return found[0] if found else None


def first_gradient(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """The first parameter in backward order whose gradient is not finite; None if all are finite."""
    named = reversed(list(parameters))
    return next((name for name, p in named if p.grad is not None and not local_tensor(p.grad).isfinite().all()), None)
