"""Kernels proved: what each declares, against the definition of its op in float64.

    from seqmix.testing import parametrize_kernels

    @parametrize_kernels()
    def test_kernels(check):
        check(device="cuda")

Uninitialised memory is NaN while a check runs, so what a kernel leaves unwritten shows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from ..ops.decay import api as _decay
from ..ops.decay import fla as _decay_fla
from ..ops.decay import triton as _decay_triton
from ..ops.delta import api as _delta
from ..ops.kernels import KERNELS, Kernel, Probe
from ..ops.softmax import api as _softmax
from ..ops.softmax import flex as _softmax_flex
from ..ops.softmax import xformers as _softmax_xformers
from ..registry import SeqmixError
from .families import FAMILIES
from .kernel_case import KernelCase
from .kernel_check import KERNEL_CHECKS, KernelCheck, KernelTrial
from .outcome import Bound, Outcome, Outcomes, Status, chosen_names, known_failures, known_names, require_examples_asked
from .run import EXAMPLES
from .search import conclude
from .trial import strict_numerics

DECLARING = (_decay, _decay_fla, _decay_triton, _delta, _softmax, _softmax_flex, _softmax_xformers)
"""Importing a module declares its kernels."""


@dataclass
class KernelReport(Outcomes[KernelCheck, KernelCase]):
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
) -> KernelReport:
    """Prove what a kernel declares.

    Args:
        kernel: what is tested; it need not have been declared.
        checks: names of the checks to run; all by default.
        device: where it is tested.
        examples: examples asked for; each check takes its share.
        seed: of the cases drawn; None lets hypothesis draw anew (or use its own seed).
        shrink: whether the smallest counterexample is searched for.
        expected_failures: checks that are known to fail, each with a reason. One that passes fails.

    Raises:
        SeqmixError: a check that does not exist, or an op that has no definition here.
    """
    expected = dict(expected_failures or {})
    known_names(expected, KERNEL_CHECKS)
    names = chosen_names(checks, KERNEL_CHECKS)
    require_examples_asked(examples)
    options = {"examples": examples, "seed": seed, "shrink": shrink}
    outcomes = [
        _run(KERNEL_CHECKS[name], kernel, torch.device(device), expected=expected.get(name), **options)
        for name in names
    ]
    return KernelReport(kernel, outcomes=outcomes)


def reproduce_kernel(name: str, kernel: Kernel, case: KernelCase, *, device: str | torch.device = "cpu") -> None:
    """Run one check on one case, as a report of a failure says; raises as the check does."""
    (known,) = chosen_names([name], KERNEL_CHECKS)
    _attempt(KERNEL_CHECKS[known], kernel, torch.device(device), case)


def parametrize_kernels(
    kernels: Sequence[Kernel] | None = None,
    *,
    checks: Iterable[str] | None = None,
    expected_failures: Mapping[str, Mapping[str, str]] | None = None,
    **options: Any,
) -> Any:
    """A decorator that gives a pytest function an argument `check`, one for every kernel and check.

    The function calls it: `check()`, or `check(device="cuda")`. Where the kernel cannot run, it skips with the kernel's
    own reason.

    Args:
        kernels: what is tested; all that are declared by default.
        checks: names of the checks to run; all by default.
        expected_failures: by kernel ("decay/chunkwise/reference"), checks that are known to fail, each with a reason.
        options: as `check_kernel` has them.

    Raises:
        SeqmixError: there is no such check or kernel, or nothing to test.
    """
    import pytest

    tested = list(KERNELS.values() if kernels is None else kernels)
    if not tested:
        raise SeqmixError("parametrize_kernels was given no kernel, so nothing would be tested")
    names = chosen_names(checks, KERNEL_CHECKS)
    known = known_failures(expected_failures, [str(kernel.key) for kernel in tested], KERNEL_CHECKS, "kernel")
    cases = []
    for kernel in tested:
        for name in names:
            reasons = {check: why for check, why in known.get(str(kernel.key), {}).items() if check == name}
            run = partial(check_kernel, kernel, checks=[name], expected_failures=reasons)
            cases.append(pytest.param(Bound(run, options), id=f"{kernel.key}-{name}"))
    return pytest.mark.parametrize("check", cases)


def _run(
    check: KernelCheck,
    kernel: Kernel,
    device: torch.device,
    *,
    examples: int,
    seed: int | None,
    shrink: bool,
    expected: str | None,
) -> Outcome[KernelCheck, KernelCase]:
    if reason := check.passes_over(kernel):
        return Outcome(check, Status.SKIPPED, reason)
    probes = _probes(kernel.op, device)
    reasons = [kernel.unsupported(probe) for probe in probes]
    if all(reasons):  # what keeps it from the least that can be asked
        return Outcome(check, Status.SKIPPED, "; ".join(min(reasons, key=len)))
    asked = [probe for probe in probes if check.asks(kernel, probe)]
    if not asked:
        return Outcome(check, Status.SKIPPED, f"{kernel.key} declares nothing that this asks for")
    return conclude(
        check,
        lambda case: _attempt(check, kernel, device, case),
        FAMILIES[kernel.op].cases(asked, tokens=check.tokens, cut=check.cut),
        lambda case: _explain(check, kernel, device, case),
        subject=f"the kernel {kernel.key}",
        examples=max(1, round(examples * check.share)),
        seed=seed,
        shrink=shrink,
        expected=expected,
    )


@cache
def _probes(op: str, device: torch.device) -> list[Probe]:
    if op not in FAMILIES:
        raise SeqmixError(f"the op {op} has no definition to test kernels by; ops that have: {', '.join(FAMILIES)}")
    return list(FAMILIES[op].probes(device))


def _attempt(check: KernelCheck, kernel: Kernel, device: torch.device, case: KernelCase) -> None:
    with strict_numerics():
        check.test(KernelTrial(kernel, case, device))


def _explain(check: KernelCheck, kernel: Kernel, device: torch.device, case: KernelCase) -> list[str]:
    """A failure's case, and how to run it."""
    where = "" if device.type == "cpu" else f', device="{device}"'
    declared = KERNELS.get(kernel.key) is kernel
    found = f'find("{kernel.op}", Paradigm.{kernel.paradigm.name}, "{kernel.backend}")'
    return [
        f"The smallest case: {case!r}",
        "To reproduce:",
        *(["    import torch"] if "torch." in repr(case) else []),
        *(["    from seqmix import Paradigm", "    from seqmix.ops.kernels import find"] if declared else []),
        f"    from seqmix.testing import {type(case).__name__}, reproduce_kernel",
        f"    kernel = {found if declared else '...  # the one that was checked: it is not declared'}",
        f"    case = {case!r}",
        f'    reproduce_kernel("{check.name}", kernel, case{where})',
    ]
