"""The conformance kit: any mixer and any kernel, ours or a stranger's, is proved or refused.

    from seqmix.testing import parametrize_checks, parametrize_kernels

    @parametrize_checks([MyConfig(n_heads=2)])
    def test_conformance(check):
        check()

    @parametrize_kernels([my_kernel])
    def test_kernel(check):
        check()

Needs hypothesis (`pip install 'seqmix[test]'`).
"""

from . import checks
from .case import Case, Draw
from .check import CHECKS, Check, check
from .check_kernels import KernelReport, check_kernel, parametrize_kernels, reproduce_kernel
from .compare import CheckFailure
from .families import DecayCase, DeltaCase, SoftmaxCase
from .kernel_case import KernelCase
from .kernel_check import KERNEL_CHECKS, KernelCheck, KernelTrial, kernel_check
from .outcome import Outcome, Status
from .run import EXAMPLES, Report, check_mixer, parametrize_checks, reproduce
from .trial import Subject, Trial

__all__ = [
    "CHECKS",
    "EXAMPLES",
    "KERNEL_CHECKS",
    "Case",
    "Check",
    "CheckFailure",
    "DecayCase",
    "DeltaCase",
    "Draw",
    "KernelCase",
    "KernelCheck",
    "KernelReport",
    "KernelTrial",
    "Outcome",
    "Report",
    "SoftmaxCase",
    "Status",
    "Subject",
    "Trial",
    "check",
    "check_kernel",
    "check_mixer",
    "checks",
    "kernel_check",
    "parametrize_checks",
    "parametrize_kernels",
    "reproduce",
    "reproduce_kernel",
]
