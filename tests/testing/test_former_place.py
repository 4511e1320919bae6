"""The kit stays importable from where it was, for one minor version."""

import importlib
import sys
import warnings

import pytest

import seqmix
import seqmix.testing


@pytest.fixture
def fresh(monkeypatch):
    """As in a process that has not imported it."""
    monkeypatch.delitem(sys.modules, "seqmix.mixers.testing", raising=False)
    yield
    sys.modules.pop("seqmix.mixers.testing", None)
    vars(seqmix.mixers).pop("testing", None)


def test_the_former_place_gives_the_kit_and_warns_once(fresh):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        from seqmix.mixers.testing import CHECKS, parametrize_checks
        from seqmix.mixers.testing import check_mixer as again
    assert (CHECKS, parametrize_checks) == (seqmix.testing.CHECKS, seqmix.testing.parametrize_checks)
    assert again is seqmix.testing.check_mixer
    (warning,) = told
    assert warning.category is DeprecationWarning
    assert warning.filename == __file__
    assert "seqmix.testing" in str(warning.message)


FORMER = [
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
    "kernel_check",
    "parametrize_checks",
    "parametrize_kernels",
    "reproduce",
    "reproduce_kernel",
]
"""All that 0.1 offered there, but what the changelog says is gone."""


@pytest.mark.parametrize("name", FORMER)
def test_the_former_place_has_every_former_name(fresh, name):
    with pytest.warns(DeprecationWarning, match=r"seqmix\.testing"):
        former = importlib.import_module("seqmix.mixers.testing")
    assert getattr(former, name) is not None


def test_a_name_that_the_kit_lacks_is_an_import_error(fresh):
    with pytest.warns(DeprecationWarning, match=r"seqmix\.testing"):
        former = importlib.import_module("seqmix.mixers.testing")
    with pytest.raises(AttributeError, match="no_such_check"):
        _ = former.no_such_check


def test_it_is_no_mixer():
    assert "testing" not in seqmix.MIXERS.kinds()
