"""The conformance kit: any mixer and any kernel, built-in or your own, is tested against its contract.

from seqmix.testing import parametrize_checks, parametrize_kernels

@parametrize_checks([MyConfig(n_heads=2)])
def test_conformance(check):
    check()

@parametrize_kernels([my_kernel])
def test_kernel(check):
    check()
"""

from . import kernel_checks, mixer_checks  # noqa: F401  importing them registers the checks
from .adapt import adapt
from .check import CHECKS, KERNEL_CHECKS, Check, check, kernel_check
from .check_kernel import check_kernel, parametrize_kernels, reproduce_kernel
from .check_mixer import Report, check_mixer, parametrize_checks, reproduce
from .compare import CheckFailure
from .engine import EXAMPLES
from .kernel_case import KernelDraw
from .kernel_families import DecayCase, DeltaCase, SoftmaxCase
from .kernel_trial import KernelTrial
from .mixer_case import Case, Draw
from .mixer_trial import Trial
from .outcome import Outcome, Status

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
    "KernelDraw",
    "KernelTrial",
    "Outcome",
    "Report",
    "SoftmaxCase",
    "Status",
    "Trial",
    "adapt",
    "check",
    "check_kernel",
    "check_mixer",
    "kernel_check",
    "parametrize_checks",
    "parametrize_kernels",
    "reproduce",
    "reproduce_kernel",
]
