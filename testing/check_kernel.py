"""Checking kernels: what each declares, against the definition of its op in float64.

Uninitialised memory is NaN while a check runs, so what a kernel leaves unwritten shows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy

from ..ops.kernels.triton.launch import interpreted
from ..ops.runtime.kernel import KERNELS, Kernel, Probe, all_kernels
from ..registry import SeqmixError
from .check import KERNEL_CHECKS, KernelCheck
from .engine.outcome import CheckOutcome, Outcomes, chosen_names
from .engine.parametrize import parametrized
from .engine.run import EXAMPLES, CheckedSubject, as_many_as_asked, run_checks, strict_numerics
from .engine.source import call_source, imports
from .kernel.case import KernelCase
from .kernel.families import FAMILIES
from .kernel.fixed import PROGRAMS
from .kernel.sizes import WIDE
from .kernel.source import kernel_source
from .kernel.trial import KernelTrial

all_kernels()  # imports what declares them: a report's lines find a kernel by its name


@dataclass
class KernelReport(Outcomes):
    """All checks on one kernel."""

    kernel: Kernel


def check_kernel(
    kernel: Kernel,
    *,
    checks: Iterable[str] | None = None,
    device: str | torch.device = "cpu",
    examples: int = EXAMPLES,
    seed: int | None = 0,
    shrink: bool = True,
    expected_failures: Mapping[str, str] | None = None,
    on_outcome: Callable[[CheckOutcome], None] | None = None,
) -> KernelReport:
    """Test what a kernel declares, which need not have been declared; arguments are those of `check_mixer`.

    Fewer examples than the default have fewer fixed cases too.

    Raises:
        SeqmixError: a check that does not exist, or an op that has no definition here.
    """
    asked = {"checks": checks, "examples": examples, "seed": seed, "shrink": shrink}
    asked |= {"expected_failures": expected_failures, "on_outcome": on_outcome}
    tested = CheckedKernel(kernel, torch.device(device), examples)
    return KernelReport(kernel, outcomes=run_checks(tested, KERNEL_CHECKS, **asked))


def reproduce_kernel(name: str, kernel: Kernel, case: KernelCase, *, device: str | torch.device = "cpu") -> None:
    """Run one check on one case, as a report of a failure says; raises as the check does."""
    (known,) = chosen_names([name], KERNEL_CHECKS)
    CheckedKernel(kernel, torch.device(device)).attempt(KERNEL_CHECKS[known], case)


def parametrize_kernels(
    kernels: Sequence[Kernel] | None = None,
    *,
    checks: Iterable[str] | None = None,
    expected_failures: Mapping[str, Mapping[str, str]] | None = None,
    **options: Any,
) -> Any:
    """A decorator as `parametrize_checks`, for every kernel (all that are declared by default) and check.

    Where the kernel cannot run, it skips with the kernel's own reason. `expected_failures` are by kernel, such as
    "decay/chunkwise/reference"; options are those of `check_kernel`.

    Raises:
        SeqmixError: a check or kernel that does not exist, or nothing to test.
    """
    tested = list(KERNELS.values() if kernels is None else kernels)
    if not tested:
        raise SeqmixError("parametrize_kernels was given no kernel, so nothing would be tested")
    named = [(str(kernel.key), str(kernel.key), partial(check_kernel, kernel)) for kernel in tested]
    known = {"checks": checks, "expected_failures": expected_failures}
    return parametrized(named, KERNEL_CHECKS, what="kernel", **known, options=options)


class CheckedKernel(CheckedSubject[KernelCase]):
    """A kernel on a device, as the engine needs it."""

    what = "kernel"

    def __init__(self, kernel: Kernel, device: torch.device, examples: int = EXAMPLES) -> None:
        self.kernel, self.device, self.name = kernel, device, f"the kernel {kernel.key}"
        self.examples, self.notes = examples, {}
        if kernel.op not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise SeqmixError(f"the op {kernel.op} has no definition to test kernels by; ops that have: {known}")
        family = FAMILIES[kernel.op]
        self.probes, self.wide = list(family.probes(device)), list(family.probes(device, WIDE))

    def skip_reason(self, check: KernelCheck) -> str | None:
        if reason := check.skip_reason(self.kernel):
            return reason
        reasons = [self.kernel.unsupported(probe) for probe in (*self.probes, *self.wide)]
        if all(reasons):  # the least that keeps the kernel from anything
            return "; ".join(min(reasons, key=len))
        asked = self._asked(check, self.probes) or self._asked(check, self.wide)
        return None if asked else f"{self.kernel.key} declares nothing that this asks for"

    def cases(self, check: KernelCheck) -> SearchStrategy[KernelCase]:
        usual, wide = (self._asked(check, probes) for probes in (self.probes, self.wide))
        return FAMILIES[self.kernel.op].cases(usual, wide, check.draw)

    def fixed_cases(self, check: KernelCheck) -> list[KernelCase]:
        probes = self._asked(check, self.probes) or self._asked(check, self.wide)
        asks = partial(check.draw.asks, self.kernel)
        found = FAMILIES[self.kernel.op].fixed_cases(probes, asks, check.draw)
        if interpreted():  # one program after the other
            found = [case for case in found if case.rows * case.n_heads < PROGRAMS]
        return as_many_as_asked(found, self.examples)

    def _asked(self, check: KernelCheck, probes: Iterable[Probe]) -> list[Probe]:
        return [probe for probe in probes if check.draw.asks(self.kernel, probe)]

    def simpler(self, check: KernelCheck, case: KernelCase) -> Iterable[KernelCase]:
        return (one for one in case.simpler() if check.draw.asks(self.kernel, one.probe(self.device)))

    def attempt(self, check: KernelCheck, case: KernelCase) -> None:
        with strict_numerics():
            check.test(KernelTrial(self.kernel, case, self.device))

    def script(self, check: KernelCheck, case: KernelCase | None, **asked: Any) -> list[str]:
        device = {} if self.device.type == "cpu" else {"device": str(self.device)}
        *before, made = kernel_source(self.kernel)
        lines = [made]
        if case is None:
            kit = "check_kernel"
            lines += [call_source(kit, {"checks": [check.name], **asked, **device}, "kernel")]
        else:
            kit = f"{type(case).__name__}, reproduce_kernel"
            lines += [f"case = {case!r}", call_source("reproduce_kernel", device, f'"{check.name}"', "kernel", "case")]
        return [*before, *imports("\n".join(lines), kit), *lines]
