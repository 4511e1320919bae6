"""Where numbers stopped being finite: the first module forward, the first parameter backward."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import SeqmixError
from .sharding import own


class NotFiniteError(SeqmixError):
    """A loss or a gradient is infinite or no number: which, and where that began."""


@torch.no_grad()
def first_module(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The innermost module that is first to give a value that is not finite, in words; None if none does.

    Args:
        model: the model.
        forward: a call of it that ended in such a value; called once more, uncompiled, for compiled code has no hooks.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001 torch's signature
            value = output[0] if isinstance(output, tuple) else output
            if (
                not found
                and isinstance(value, Tensor)
                and value.is_floating_point()
                and not own(value).isfinite().all()
            ):
                found.append(name + _own_fault(module))

        return hook

    with ExitStack() as stack, torch.compiler.set_stance("force_eager"):
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(watch(name or "the model")).remove)
        forward()
    return found[0] if found else None


def first_gradient(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """The name of the first parameter, as backward goes, whose gradient is not finite; None if there is none."""
    for name, parameter in reversed(list(parameters)):
        if parameter.grad is not None and not own(parameter.grad).isfinite().all():
            return name
    return None


def _own_fault(module: nn.Module) -> str:
    bad = [name for name, parameter in module.named_parameters(recurse=False) if not own(parameter).isfinite().all()]
    return f", whose {bad[0]} is not finite" if bad else ""
