"""A kernel check: a named promise, what it draws, and the function that tests it on one kernel and one case."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..ops.kernels import Kernel, Probe
from .check import name_and_promise
from .compare import Differences
from .kernel_case import LENGTHS, Exact, KernelCase, Tensors, differentiate, leaves


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

    def gradients(self, outputs: Tensors, inputs: Tensors) -> Tensors:
        """The case's gradients by name of the input."""
        above = {
            name: self.case.cotangent(name, outputs[name].detach(), self.device) for name in self.case.differentiated
        }
        return differentiate(outputs, above, {name: inputs[name] for name in self.case.grad})

    def compare(self, what: str, outputs: Tensors, gradients: Tensors | None = None) -> None:
        """Shape, dtype and every element against the definition.

        Raises:
            CheckFailure: something differs; every tensor that does is named, with its first step and head.
        """
        case, exact, tolerance = self.case, self.exact, self.kernel.tolerances[self.case.dtype]
        lost = torch.finfo(case.dtype).tiny / tolerance
        with Differences(what, tolerance) as found:
            for name, value in exact.outputs.items():
                shown = {"output": "the output", "state": "the final state"}.get(name, f"the final state's {name}")
                axes = case.axes_of(name)
                if value.is_floating_point():
                    size = _size(exact.outputs_terms[name], axes) + lost
                    found.close(shown, outputs[name], value, case.dtype_of(name), size, axes)
                else:
                    found.tensor(shown, outputs[name].cpu(), value, axes)
            for name, gradient in (gradients or {}).items():
                axes = case.axes_of(name)
                size = _size(exact.gradients_terms[name], axes) + lost
                found.close(f"the gradient of {name}", gradient, exact.gradients[name], case.dtype_of(name), size, axes)


def _size(terms: Tensor, axes: str) -> Tensor:
    """What errors are relative to: the terms of an element, and the mean of its head's."""
    others = [i for i, axis in enumerate(axes) if axis not in "HG"]
    return terms + (terms.mean(others, keepdim=True) if terms.numel() and others else terms)


@dataclass(frozen=True, kw_only=True)
class KernelCheck:
    """One promise of every kernel."""

    name: str
    """As in reports: that of the function."""
    promise: str
    """One sentence: the function's docstring."""
    test: Callable[[KernelTrial], None]
    """Raises where the promise is broken."""
    asks: Callable[[Kernel, Probe], bool]
    """Whether it asks a kernel for this."""
    tokens: st.SearchStrategy[int]
    """Lengths of rows and documents."""
    cut: bool
    """Whether rows and documents are cut."""
    share: float
    """Cases, as a share of the examples asked for."""
    passes_over: Callable[[Kernel], str | None]
    """Why a kernel cannot be tested like this, whatever it is asked; None where it can."""


KERNEL_CHECKS: dict[str, KernelCheck] = {}
"""All kernel checks by name, in the order they run."""


def taken(kernel: Kernel, probe: Probe) -> bool:
    """What the kernel takes."""
    return not kernel.unsupported(probe)


def kernel_check(
    *,
    share: float,
    asks: Callable[[Kernel, Probe], bool] = taken,
    tokens: st.SearchStrategy[int] = LENGTHS,
    cut: bool = False,
    passes_over: Callable[[Kernel], str | None] = lambda _: None,
) -> Callable[[Callable[[KernelTrial], None]], Callable[[KernelTrial], None]]:
    """Register a function of a `KernelTrial` as a check of its name; its docstring is the promise."""

    def register(test: Callable[[KernelTrial], None]) -> Callable[[KernelTrial], None]:
        name, promise = name_and_promise(test, KERNEL_CHECKS)
        KERNEL_CHECKS[name] = KernelCheck(
            name=name,
            promise=promise,
            test=test,
            asks=asks,
            tokens=tokens,
            cut=cut,
            share=share,
            passes_over=passes_over,
        )
        return test

    return register
