"""Where numbers stopped being finite: the first module forward, the first parameter backward."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..registry import SeqmixError
from .sharding import own


class NotFiniteError(SeqmixError):
    """A loss or a gradient is infinite or no number: which, and where that began."""


@torch.no_grad()
def first_module(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The innermost module that is first to give a value that is not finite, in words; None if none does.

    `forward` calls the model, and ended in such a value: it is called once more, for compiled code has no hooks.
    """
    found: list[str] = []
    names = {module: name or "the model" for name, module in model.named_modules()}

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001 torch's signature
        value = output[0] if isinstance(output, tuple) else output
        if found or module not in names or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        if not own(value).isfinite().all():
            bad = [name for name, p in module.named_parameters(recurse=False) if not own(p).isfinite().all()]
            found.append(names[module] + (f", whose {bad[0]} is not finite" if bad else ""))

    with register_module_forward_hook(watch), torch.compiler.set_stance("force_eager"):
        forward()
    return found[0] if found else None


def first_gradient(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """The name of the first parameter, as backward goes, whose gradient is not finite; None if there is none."""
    named = reversed(list(parameters))
    return next((name for name, p in named if p.grad is not None and not own(p.grad).isfinite().all()), None)
