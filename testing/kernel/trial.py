"""What a check does with a kernel on one case."""

from functools import cached_property

import torch
from torch import Tensor

from ...ops.runtime.kernel import Kernel
from ..compare import Differences
from ..gradients import gradients
from .case import Exact, KernelCase, Tensors, leaves


class KernelTrial:
    """A kernel and one case, and what checks do with them."""

    def __init__(self, kernel: Kernel, case: KernelCase, device: torch.device) -> None:
        self.kernel, self.case, self.device = kernel, case, device

    @cached_property
    def exact(self) -> Exact:
        """What the definition makes of the case."""
        return self.case.exact(self.kernel)

    def leaves(self) -> Tensors:
        """The inputs, as leaves of a new graph where a gradient is taken; they may be written."""
        return leaves(self.case.inputs(self.device), self.case.grad)

    def run(self, inputs: Tensors, case: KernelCase | None = None) -> Tensors:
        """What the kernel makes of them, in grad mode if the case has gradients."""
        case = case or self.case
        with torch.set_grad_enabled(bool(case.grad)):
            return case.run(self.kernel, inputs)

    def above(self, outputs: Tensors) -> Tensors:
        """The gradients from above of the case's outputs."""
        case = self.case
        return {name: case.cotangent(name, outputs[name].detach(), self.device) for name in case.differentiated}

    def gradients(self, outputs: Tensors, inputs: Tensors, above: Tensors | None = None, **options: bool) -> Tensors:
        """The case's gradients by name of the input, from those `above`, the case's own by default."""
        above = self.above(outputs) if above is None else above
        return gradients(outputs, above, {name: inputs[name] for name in self.case.grad}, **options)

    def compare(self, what: str, outputs: Tensors, gradients: Tensors | None = None) -> None:
        """Shape, dtype and every element against the definition.

        Raises:
            CheckFailure: something differs; every tensor that does is named, with its first step and head.
        """
        case, exact, tolerance = self.case, self.exact, self.kernel.tolerances[self.case.dtype]
        lost = torch.finfo(case.dtype).tiny / tolerance
        defined = {name: x for name, x in exact.outputs.items() if name not in case.undefined}
        with Differences(what, tolerance) as differences:
            for name, value in defined.items():
                shown = {"output": "the output", "state": "the final state"}.get(name, f"the final state's {name}")
                axes = case.axes_of(name)
                if value.is_floating_point():
                    size = _size(exact.outputs_terms[name], axes)
                    size += case.lost(name) / tolerance
                    differences.close(shown, outputs[name], value, case.dtype_of(name), size, axes)
                else:
                    differences.tensor(shown, outputs[name].cpu(), value, axes)
            for name, gradient in (gradients or {}).items():
                axes = case.axes_of(name)
                size = _size(exact.gradients_terms[name], axes) + lost
                differences.close(
                    f"the gradient of {name}", gradient, exact.gradients[name], case.dtype_of(name), size, axes
                )


def _size(terms: Tensor, axes: str) -> Tensor:
    """What errors are relative to: the terms of an element, and the mean of its head's."""
    others = [i for i, axis in enumerate(axes) if axis not in "HG"]
    return terms + (terms.mean(others, keepdim=True) if terms.numel() and others else terms)
