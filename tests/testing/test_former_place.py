"""The kit stays importable from where it was, for one minor version."""

import importlib
import sys
from pathlib import Path

import pytest

import seqmix
import seqmix.testing

FORMER = (
    "CHECKS EXAMPLES KERNEL_CHECKS Case Check CheckFailure DecayCase DeltaCase Draw KernelCase KernelReport "
    "KernelTrial Outcome Report SoftmaxCase Status Subject Trial check check_kernel check_mixer kernel_check "
    "parametrize_checks parametrize_kernels reproduce reproduce_kernel"
)
"""All that 0.1 offered there, but what the changelog says is gone."""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """As in a process that has not imported it."""
    monkeypatch.delitem(sys.modules, "seqmix.mixers.testing", raising=False)
    yield
    sys.modules.pop("seqmix.mixers.testing", None)
    vars(seqmix.mixers).pop("testing", None)


def test_the_former_place_gives_the_kit_and_warns_once():
    with pytest.warns(DeprecationWarning, match=r"seqmix\.testing") as warnings:
        from seqmix.mixers.testing import CHECKS, check_mixer
    assert (CHECKS, check_mixer) == (seqmix.testing.CHECKS, seqmix.testing.check_mixer)
    (warning,) = warnings
    # pytest rewrites the modules of what brings a plug-in, and is then the one that imports
    assert Path(warning.filename).name in (Path(__file__).name, "rewrite.py")


def test_the_former_place_has_the_former_names():
    with pytest.warns(DeprecationWarning, match=r"seqmix\.testing"):
        former = importlib.import_module("seqmix.mixers.testing")
    assert [name for name in FORMER.split() if not hasattr(former, name)] == []
    with pytest.raises(AttributeError, match="no_such_check"):
        _ = former.no_such_check
    assert "testing" not in seqmix.MIXERS.kinds()
