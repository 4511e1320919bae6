"""A trial of a kernel on one case: run it, differentiate it, compare it with the definition."""

from functools import cached_property

import torch
from torch import Tensor

from ...ops.runtime.kernel import Kernel
from ..compare import Differences
from ..gradients import gradients
from .case import Exact, KernelCase, Tensors, leaves


class KernelTrial:
    """A kernel and one case, with the operations that checks use."""

    def __init__(self, kernel: Kernel, case: KernelCase, device: torch.device) -> None:
        self.kernel, self.case, self.device = kernel, case, device

    @cached_property
    def exact(self) -> Exact:
        """Exact results of the case, by the definition in float64."""
        return self.case.exact(self.kernel)

    def leaves(self) -> Tensors:
        """Return new inputs, which may be overwritten; those with a gradient are leaves of a new graph."""
        return leaves(self.case.inputs(self.device), self.case.grad)

    def run(self, inputs: Tensors, case: KernelCase | None = None) -> Tensors:
        """Run the kernel on the inputs; grad mode is on if the case has gradients. `case` replaces the trial's case."""
        case = case or self.case
        with torch.set_grad_enabled(bool(case.grad)):
            return case.run(self.kernel, inputs)

    def upstream(self, outputs: Tensors) -> Tensors:
        """Return the upstream gradients of the case's outputs, by name."""
        case = self.case
        return {name: case.cotangent(name, outputs[name].detach(), self.device) for name in case.differentiated}

    def gradients(self, outputs: Tensors, inputs: Tensors, upstream: Tensors | None = None, **options: bool) -> Tensors:
        """Return the gradients of the case's inputs by name.

        Args:
            outputs: the outputs of `run`.
            inputs: the inputs of `run`.
            upstream: the upstream gradients; None for the case's own.
            options: `create_graph` and `retain_graph`, as in torch.autograd.grad.
        """
        upstream = self.upstream(outputs) if upstream is None else upstream
        return gradients(outputs, upstream, {name: inputs[name] for name in self.case.grad}, **options)

    def compare(self, what: str, outputs: Tensors, gradients: Tensors | None = None) -> None:
        """Compare shape, dtype and every element with the definition; `what` begins the message of a failure.

        Raises:
            CheckFailure: a tensor differs; the message names every such tensor, with the first step and head.
        """
        case, exact, tolerance = self.case, self.exact, self.kernel.tolerances[self.case.dtype]
        underflow = torch.finfo(case.dtype).tiny / tolerance
        defined = {name: x for name, x in exact.outputs.items() if name not in case.undefined}
        with Differences(what, tolerance) as differences:
            for name, value in defined.items():
                label = {"output": "the output", "state": "the final state"}.get(name, f"the final state's {name}")
                axes = case.axes_of(name)
                if value.is_floating_point():
                    size = _error_scale(exact.outputs_terms[name], axes)
                    size += case.underflow(name) / tolerance
                    differences.close(label, outputs[name], value, case.dtype_of(name), size, axes)
                else:
                    differences.tensor(label, outputs[name].cpu(), value, axes)
            for name, gradient in (gradients or {}).items():
                axes = case.axes_of(name)
                size = _error_scale(exact.gradients_terms[name], axes) + underflow
                differences.close(
                    f"the gradient of {name}", gradient, exact.gradients[name], case.dtype_of(name), size, axes
                )


def _error_scale(terms: Tensor, axes: str) -> Tensor:
    """Return the scale of each element's allowed error: its terms, plus the mean of the terms over its head."""
    averaged = [i for i, axis in enumerate(axes) if axis not in "HG"]
    return terms + (terms.mean(averaged, keepdim=True) if terms.numel() and averaged else terms)
