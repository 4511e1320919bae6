"""Tests of a feature of mixers on the cases that the conformance kit draws, and on wrong mixers."""

import pytest

from seqmix import MIXERS
from seqmix.testing import CheckFailure, Draw, Status
from seqmix.testing.check import Check
from seqmix.testing.check_mixer import CheckedMixer
from seqmix.testing.engine.run import run_checks
from seqmix.testing.mixer.subject import Subject, build

BUILT_IN = [kind for kind in MIXERS.kinds() if MIXERS.origin(kind).startswith("seqmix.")]


def mixers_with(feature):
    """Examples of the built-in mixers that have a feature, as pytest parameters."""
    configs = [MIXERS.resolve(kind).example() for kind in BUILT_IN]
    having = [config for config in configs if feature(build(config, Subject(config).d_model))]
    assert having
    return pytest.mark.parametrize("config", having, ids=lambda config: config.kind)


def require_property(test, config, draw: Draw, feature, examples=10):
    """Run a function of a `Trial` on drawn cases of a configuration and its options.

    Raises:
        CheckFailure: on one of them it fails.
    """
    needs = (lambda _, mixer: None if feature(mixer) else "the feature is not there",)
    about = " ".join(test.__doc__.split())
    check = Check(name=test.__name__, property=about, test=test, needs=needs, draw=draw, share=1.0)
    tested = CheckedMixer(Subject(config), examples)
    options = {"checks": None, "expected_failures": None, "examples": examples, "seed": 0, "shrink": False}
    (outcome,) = run_checks(tested, {check.name: check}, **options)
    if outcome.status is not Status.PASSED:
        raise CheckFailure(outcome.reason)
