"""Check kernels: everything that a kernel declares is compared with the definition of its op in float64.

Uninitialised memory is NaN while a check runs, so an element that a kernel does not write is found.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy

from ..ops.kernels.triton.launch import is_interpreted
from ..ops.runtime.kernel import KERNELS, Kernel, Probe, all_kernels
from ..registry import SeqmixError
from .check import KERNEL_CHECKS, KernelCheck
from .engine.outcome import CheckOutcome, Outcomes, chosen_names
from .engine.parametrize import parametrized
from .engine.run import EXAMPLES, CheckedSubject, run_checks, sample_evenly, strict_numerics
from .engine.source import call_source, imports
from .kernel.case import KernelCase
from .kernel.families import FAMILIES
from .kernel.fixed import PROGRAMS
from .kernel.sizes import WIDE
from .kernel.source import kernel_source
from .kernel.trial import KernelTrial

all_kernels()  # import every declaration: the script of a report looks kernels up by name


@dataclass
class KernelReport(Outcomes):
    """Outcomes of all checks of one kernel."""

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
    """Test a kernel against the definition of its op, within the tolerances and limits that it declares.

    The kernel need not be registered. If `examples` is below the default, fewer fixed cases run too.

    Args:
        kernel: the kernel to test.
        checks: names of the checks to run; by default all.
        device: device to run the kernel on.
        examples: number of requested examples; each check runs its share of them (`Check.share`).
        seed: seed of the drawn cases; None leaves it to hypothesis.
        shrink: True to reduce a failing case.
        expected_failures: checks that are known to fail, each with a reason. One that passes counts as a failure.
        on_outcome: called after each check with its outcome.

    Raises:
        SeqmixError: a check does not exist, or the kit has no definition of the kernel's op.
    """
    tested = CheckedKernel(kernel, torch.device(device), examples)
    outcomes = run_checks(
        tested,
        KERNEL_CHECKS,
        checks=checks,
        examples=examples,
        seed=seed,
        shrink=shrink,
        expected_failures=expected_failures,
        on_outcome=on_outcome,
    )
    return KernelReport(kernel, outcomes=outcomes)


def reproduce_kernel(name: str, kernel: Kernel, case: KernelCase, *, device: str | torch.device = "cpu") -> None:
    """Run one check on one case; the report of a failure prints such a call.

    Args:
        name: name of the check.
        kernel: the kernel to test.
        case: the case to run it on.
        device: device to run the kernel on.

    Raises:
        CheckFailure: the property does not hold on this case.
    """
    (known,) = chosen_names([name], KERNEL_CHECKS)
    CheckedKernel(kernel, torch.device(device)).attempt(KERNEL_CHECKS[known], case)


def parametrize_kernels(
    kernels: Sequence[Kernel] | None = None,
    *,
    checks: Iterable[str] | None = None,
    expected_failures: Mapping[str, Mapping[str, str]] | None = None,
    **options: Any,
) -> Any:
    """Return a decorator that makes a pytest function one test per kernel and check, with an argument `check`.

    The function has to call `check()`. The test is skipped with the kernel's own reason if the kernel cannot run here.

    Args:
        kernels: kernels to test; by default all declared ones.
        checks: names of the checks to run; by default all.
        expected_failures: checks that are known to fail, each with a reason, by the name of the kernel, such as
            "decay/chunkwise/reference".
        options: further arguments of `check_kernel`.

    Raises:
        SeqmixError: a check or kernel does not exist, or there is nothing to test.
    """
    tested = list(KERNELS.values() if kernels is None else kernels)
    if not tested:
        raise SeqmixError(
            "parametrize_kernels expects at least one kernel, got none: pass one, or omit `kernels` to test all"
        )
    named = [(str(kernel.key), str(kernel.key), partial(check_kernel, kernel)) for kernel in tested]
    selection = {"checks": checks, "expected_failures": expected_failures}
    return parametrized(named, KERNEL_CHECKS, what="kernel", **selection, options=options)


class CheckedKernel(CheckedSubject[KernelCase]):
    """A kernel on a device, in the form that the engine runs checks on."""

    what = "kernel"

    def __init__(self, kernel: Kernel, device: torch.device, examples: int = EXAMPLES) -> None:
        self.kernel, self.device, self.name = kernel, device, f"the kernel {kernel.key}"
        self.examples, self.notes = examples, {}
        if kernel.op not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise SeqmixError(
                f"the kit has no definition of {kernel.op}, so it cannot check this kernel; defined ops: {known}"
            )
        family = FAMILIES[kernel.op]
        self.probes, self.wide = list(family.probes(device)), list(family.probes(device, WIDE))

    def skip_reason(self, check: KernelCheck) -> str | None:
        if reason := check.skip_reason(self.kernel):
            return reason
        reasons = [self.kernel.unsupported(probe) for probe in (*self.probes, *self.wide)]
        if all(reasons):  # no probe can run: name the fewest reasons that any of them has
            return "; ".join(min(reasons, key=len))
        probes = self._select_probes(check, self.probes) or self._select_probes(check, self.wide)
        return None if probes else f"{self.kernel.key} declares nothing that this check tests"

    def cases(self, check: KernelCheck) -> SearchStrategy[KernelCase]:
        usual, wide = (self._select_probes(check, probes) for probes in (self.probes, self.wide))
        return FAMILIES[self.kernel.op].cases(usual, wide, check.draw)

    def fixed_cases(self, check: KernelCheck) -> list[KernelCase]:
        probes = self._select_probes(check, self.probes) or self._select_probes(check, self.wide)
        runs_on = partial(check.draw.runs_on, self.kernel)
        cases = FAMILIES[self.kernel.op].fixed_cases(probes, runs_on, check.draw)
        if is_interpreted():  # Triton's interpreter runs programs one after the other
            cases = [case for case in cases if case.rows * case.n_heads < PROGRAMS]
        return sample_evenly(cases, self.examples)

    def _select_probes(self, check: KernelCheck, probes: Iterable[Probe]) -> list[Probe]:
        """Return the probes, which describe kinds of calls, that a check runs this kernel on."""
        return [probe for probe in probes if check.draw.runs_on(self.kernel, probe)]

    def simpler(self, check: KernelCheck, case: KernelCase) -> Iterable[KernelCase]:
        return (simpler for simpler in case.simpler() if check.draw.runs_on(self.kernel, simpler.probe(self.device)))

    def attempt(self, check: KernelCheck, case: KernelCase) -> None:
        with strict_numerics():
            check.test(KernelTrial(self.kernel, case, self.device))

    def script(self, check: KernelCheck, case: KernelCase | None, **run_options: Any) -> list[str]:
        device = {} if self.device.type == "cpu" else {"device": str(self.device)}
        *setup, assignment = kernel_source(self.kernel)
        lines = [assignment]
        if case is None:
            kit = "check_kernel"
            lines += [call_source(kit, {"checks": [check.name], **run_options, **device}, "kernel")]
        else:
            kit = f"{type(case).__name__}, reproduce_kernel"
            lines += [f"case = {case!r}", call_source("reproduce_kernel", device, f'"{check.name}"', "kernel", "case")]
        return [*setup, *imports("\n".join(lines), kit), *lines]
