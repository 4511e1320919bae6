"""Wrong mixers and helpers shared by the tests of the conformance kit."""

from functools import partial

import pytest
from forgetful_mixer import ForgetfulConfig

from seqmix.mixers.retention import Retention, RetentionConfig
from seqmix.testing import Status, check_mixer, parametrize_checks


@pytest.fixture
def forgetful():
    """The configuration of a wrong mixer, from a module as a user would have it."""
    return ForgetfulConfig(n_heads=2)


@pytest.fixture
def mixing(monkeypatch):
    """Let retention do something else: `wrong(inner, x, call)`."""

    def replace(wrong):
        inner = Retention.mix
        monkeypatch.setattr(Retention, "mix", lambda self, x, call: wrong(partial(inner, self), x, call))
        return RetentionConfig(n_heads=2)

    return replace


@pytest.fixture
def failure():
    """The outcome of the one check that is run, which fails."""

    def of(config, name, **options):
        report = check_mixer(config, checks=[name], **options)
        (outcome,) = report.outcomes
        assert outcome.status is Status.FAILED
        assert report.failures == [outcome]
        return outcome

    return of


@pytest.fixture
def bound():
    """What a pytest function is given as `check`."""

    def of(config, name, **options):
        cases = parametrize_checks([config], examples=5, **options).mark.args[1]
        (found,) = (case.values[0] for case in cases if case.id == f"{config.kind}-{name}")
        return found

    return of


@pytest.fixture
def built():
    """A configuration that builds so."""

    def of(build):
        return type("BuiltConfig", (RetentionConfig,), {"build": build, "__module__": __name__})(n_heads=1)

    return of
