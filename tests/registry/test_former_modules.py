"""Old names of modules and functions still work, with a warning that gives the new name."""

import importlib
import sys
from importlib.util import find_spec
from unittest.mock import Mock

import pytest

from seqmix import load_run
from seqmix.former_modules import MODULES
from seqmix.models import LanguageModel
from seqmix.ops.recurrence import Recurrence
from seqmix.registry.deprecated import former_parameters
from seqmix.testing import Trial
from seqmix.training.checkpoint.files import CheckpointError

FORMER = {
    "seqmix.convert": "import_from",
    "seqmix.experiments.units": "quantity",
    "seqmix.linearize": "Plan",
    "seqmix.linearize.course": "Linearization",
    "seqmix.mixers.contract": "SequenceMixer",
    "seqmix.mixers.parts.decay_rates": "FixedDecay",
    "seqmix.ops.autograd": "Op",
    "seqmix.ops.call": "Call",
    "seqmix.ops.packing": "Documents",
    "seqmix.ops.softmax": "softmax_attention",
    "seqmix.ops.softmax.cache": "GrowingCache",
    "seqmix.training.optim": "build_optimizer",
    "seqmix.training.saved_run": "load_run",
}
FUNCTIONS = {
    "seqmix.registry": {"choices": "choices_hint", "nearest": "nearest_hint"},
    "seqmix.data.source": {"LossSlice": "LossPartition"},
    "seqmix.ops.decay": {"decay_recurrence": "decay"},
    "seqmix.ops.delta": {"delta_rule": "delta"},
    "seqmix.ops.dplr": {"dplr_recurrence": "dplr"},
    "seqmix.ops.scan": {"scan_recurrence": "scan", "selective_recurrence": "selective_scan"},
    "seqmix.ops.convolution": {"convolve_short": "short_convolution", "convolve_long": "long_convolution"},
    "seqmix.ops.attention": {"softmax": "softmax_attention", "moved": "resize_cache", "stored_as": "cast_cache"},
}


@pytest.fixture(autouse=True)
def _fresh():
    """As in a process that has not imported them."""
    for name in MODULES:
        sys.modules.pop(name, None)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("former", "name"), FORMER.items())
def test_old_module_name_warns_and_exposes_the_new_module(former, name):
    with pytest.warns(DeprecationWarning, match=f"{former} is now {MODULES[former]}"):
        module = importlib.import_module(former)
    assert getattr(module, name) is getattr(importlib.import_module(MODULES[former]), name)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name


@pytest.mark.parametrize("former", MODULES)
def test_every_new_module_name_exists(former):
    assert find_spec(MODULES[former])


@pytest.mark.parametrize(("module", "names"), FUNCTIONS.items())
def test_old_function_name_warns_and_returns_the_new_one(module, names):
    found = importlib.import_module(module)
    for former, present in names.items():
        with pytest.warns(DeprecationWarning, match=f"{former} is now {present}"):
            assert getattr(found, former) is getattr(found, present)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = found.no_such_name


@pytest.mark.parametrize(
    ("owner", "former", "present"),
    [(LanguageModel, "reset_rest", "apply_model_init"), (Trial, "kept", "without_growing_state")],
)
def test_old_method_name_warns_and_calls_the_new_method(owner, former, present):
    found = Mock(spec=owner)
    with pytest.warns(DeprecationWarning, match=rf"{owner.__name__}\.{former} is now {owner.__name__}\.{present}$"):
        getattr(owner, former)(found, "argument")
    getattr(found, present).assert_called_once_with("argument")


@pytest.mark.parametrize(("former", "present"), [("matrix", "state_shape"), ("wide", "wide_dtype")])
def test_old_property_name_warns_and_returns_the_new_property(former, present):
    found = Mock(spec=Recurrence)
    with pytest.warns(DeprecationWarning, match=rf"Recurrence\.{former} is now Recurrence\.{present}$"):
        value = getattr(Recurrence, former).fget(found)
    assert value is getattr(found, present)


def test_old_parameter_name_warns_and_sets_the_new_parameter():
    @former_parameters(tell="on_note")
    def load(run, on_note=None):
        return run, on_note

    with pytest.warns(DeprecationWarning, match=r"^load\(tell=\) is now on_note=$"):
        assert load("run", tell=print) == ("run", print)
    assert load("run", on_note=print) == load("run", print) == ("run", print)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tel'"):
        load("run", tel=print)
    with pytest.warns(DeprecationWarning, match="is now on_note="), pytest.raises(CheckpointError):
        load_run("no/run", tell=print)


def test_class_moved_from_parts_to_its_mixer_is_found_with_a_warning():
    parts = importlib.import_module("seqmix.mixers.parts")
    with pytest.warns(DeprecationWarning, match=r"FixedDecay is now seqmix\.mixers\.retention\.FixedDecay"):
        assert parts.FixedDecay is importlib.import_module("seqmix.mixers.retention").FixedDecay
