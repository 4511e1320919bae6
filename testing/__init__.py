"""The conformance kit: tests any mixer or kernel, built-in or your own, against its contract.

from seqmix.testing import parametrize_checks, parametrize_kernels

@parametrize_checks([MyConfig(n_heads=2)])
def test_conformance(check):
    check()

@parametrize_kernels([my_kernel])
def test_kernel(check):
    check()
"""

from . import contract, stress  # noqa: F401  importing them registers the checks
from .adapters.module import adapt
from .check import CHECKS, KERNEL_CHECKS, Check, check, kernel_check
from .check_kernel import check_kernel, parametrize_kernels, reproduce_kernel
from .check_mixer import Report, check_mixer, parametrize_checks, reproduce
from .compare import CheckFailure
from .contract import kernels as _kernel_checks  # noqa: F401  importing it registers the checks of kernels
from .engine.outcome import CheckOutcome, Status
from .engine.run import EXAMPLES
from .kernel.case import KernelDraw
from .kernel.families import DecayCase, DeltaCase, SoftmaxCase
from .kernel.scans import ConvolutionCase, DiagonalCase, LogScanCase, ScanCase, SelectiveCase
from .kernel.trial import KernelTrial
from .mixer.case import Case, Draw
from .mixer.trial import Trial
from .residual import check_residual

Outcome = CheckOutcome
"""Alias of `CheckOutcome`: its name in release 0.2."""

__all__ = [
    "CHECKS",
    "EXAMPLES",
    "KERNEL_CHECKS",
    "Case",
    "Check",
    "CheckFailure",
    "CheckOutcome",
    "ConvolutionCase",
    "DecayCase",
    "DeltaCase",
    "DiagonalCase",
    "Draw",
    "KernelDraw",
    "KernelTrial",
    "LogScanCase",
    "Outcome",
    "Report",
    "ScanCase",
    "SelectiveCase",
    "SoftmaxCase",
    "Status",
    "Trial",
    "adapt",
    "check",
    "check_kernel",
    "check_mixer",
    "check_residual",
    "kernel_check",
    "parametrize_checks",
    "parametrize_kernels",
    "reproduce",
    "reproduce_kernel",
]
