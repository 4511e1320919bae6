"""The conformance kit itself: what it reports of a wrong mixer, what it skips, and what it draws."""

import importlib
import textwrap
from dataclasses import replace
from typing import Literal

import pytest
import torch
from pydantic import Field

from seqmix import MIXERS, Paradigm
from seqmix.mixers.attention import AttentionConfig
from seqmix.mixers.base import ContractError
from seqmix.mixers.linear_attention import LinearAttentionConfig
from seqmix.mixers.retention import Retention, RetentionConfig
from seqmix.mixers.testing import (
    CHECKS,
    Case,
    CheckFailure,
    Status,
    check,
    check_mixer,
    checks,
    parametrize_checks,
    reproduce,
)
from seqmix.mixers.testing.case import source
from seqmix.mixers.testing.options import alternatives, changed
from seqmix.registry import SeqmixError

FORGETFUL = '''
"""Retention that reads no state token by token."""

from typing import Literal

from seqmix import Paradigm
from seqmix.mixers.retention import Retention, RetentionConfig


class ForgetfulConfig(RetentionConfig):
    kind: Literal["forgetful"] = "forgetful"

    def build(self, d_model, *, layer_idx, n_layers):
        return Forgetful(self, d_model)


class Forgetful(Retention):
    def mix(self, x, state, paradigm, cu_seqlens, return_state):
        state = None if paradigm is Paradigm.RECURRENT else state
        return super().mix(x, state, paradigm, cu_seqlens, return_state)
'''


@pytest.fixture
def forgetful(tmp_path, monkeypatch):
    """Its configuration, from a module as a user would have it."""
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("forgetful").ForgetfulConfig(n_heads=2)
    del importlib.sys.modules["forgetful"]


def failure(config, name, **options):
    """The one outcome of a check that fails."""
    report = check_mixer(config, checks=[name], **options)
    (outcome,) = report.outcomes
    assert outcome.status is Status.FAILED
    assert not report.passed
    assert report.failures == [outcome]
    return outcome


# ---- a failure


def test_a_failure_says_what_differs_where_and_on_which_smallest_case(forgetful):
    outcome = failure(forgetful, "paradigms_agree")
    assert outcome.case == Case(start="initial", options={"chunk_size": 3})
    first, versus, difference, *rest = outcome.reason.splitlines()
    assert first.startswith("forgetful fails paradigms_agree: Every paradigm gives the same output, final state")
    assert versus == "chunkwise against recurrent:"
    assert "the gradient of the state's memory differs in 144 of 144 elements, by up to" in difference
    assert rest[0] == "The configuration: ForgetfulConfig(n_heads=2)"
    assert rest[1] == f"The smallest case: {outcome.case!r}"


def test_the_first_difference_is_that_of_the_first_step(forgetful):
    with pytest.raises(CheckFailure, match=r"the output differs in .* first at step 0, row 0, channel 0: "):
        reproduce("paradigms_agree", forgetful, Case(lengths=(4,), batch_size=2, start="read"))


def test_a_difference_in_a_state_names_its_head(forgetful):
    with pytest.raises(CheckFailure, match=r"memory differs in .* elements in heads 0, 1 of 2, .* first at head 0, "):
        reproduce("pieces_equal_the_whole", forgetful, Case(lengths=(2, 2), paradigms=(Paradigm.RECURRENT,) * 2))


def test_the_snippet_of_a_report_reproduces_it(forgetful):
    outcome = failure(forgetful, "paradigms_agree")
    _, _, snippet = outcome.reason.partition("To reproduce:\n")
    with pytest.raises(CheckFailure, match="the gradient of the state's memory differs"):
        exec(textwrap.dedent(snippet), {})


def test_a_case_shrinks_to_the_fewest_tokens_on_which_it_fails(monkeypatch):
    def leaks_from_the_third_token_on(self, x, state, paradigm, cu_seqlens, return_state):
        y, after = original(self, x, state, paradigm, cu_seqlens, return_state)
        return (y + x[:, 2:3].sum() if x.shape[1] >= 3 else y), after

    original = Retention.mix
    monkeypatch.setattr(Retention, "mix", leaks_from_the_third_token_on)
    outcome = failure(RetentionConfig(n_heads=2), "the_future_changes_nothing")
    assert outcome.case.length == 3
    assert (outcome.case.batch_size, outcome.case.start, outcome.case.seed) == (1, "none", 0)


def test_an_error_of_the_mixer_is_told_with_its_line(monkeypatch):
    def broken(*_):
        raise KeyError("no such weight")

    monkeypatch.setattr(Retention, "mix", broken)
    outcome = failure(RetentionConfig(n_heads=2), "paradigms_agree", shrink=False)
    assert "raised KeyError: 'no such weight'" in outcome.reason
    assert "test_testing.py:" in outcome.reason


def test_what_passes_once_and_fails_once_is_told(monkeypatch):
    def flaky(self, *arguments):
        calls.append(1)
        y, after = original(self, *arguments)
        return (y + (len(calls) == 3)), after

    calls, original = [], Retention.mix
    monkeypatch.setattr(Retention, "mix", flaky)
    outcome = failure(RetentionConfig(n_heads=2), "the_future_changes_nothing")
    assert "the same case passed once and failed once" in outcome.reason


# ---- expected failures, skips


def test_an_expected_failure_is_none(forgetful):
    report = check_mixer(forgetful, checks=["paradigms_agree"], expected_failures={"paradigms_agree": "it forgets"})
    (outcome,) = report.outcomes
    assert (outcome.status, outcome.reason) == (Status.EXPECTED_FAILURE, "it forgets")
    assert report.passed


def test_an_expected_failure_that_passes_fails():
    expected = {"the_future_changes_nothing": "it looks ahead"}
    outcome = failure(RetentionConfig(n_heads=2), "the_future_changes_nothing", expected_failures=expected)
    assert outcome.reason == "the_future_changes_nothing passed, and was expected to fail: it looks ahead"


class OneWayConfig(RetentionConfig):
    kind: Literal["one_way"] = "one_way"
    chunk_size: Literal[1] = 1

    @property
    def traits(self):
        return replace(super().traits, paradigms=frozenset({Paradigm.CHUNKWISE}), packing=False)


def test_a_skip_names_the_trait():
    report = check_mixer(OneWayConfig(n_heads=2), compiles=False, examples=1, vary=False)
    skipped = {o.check.name: o.reason for o in report.outcomes if o.status is Status.SKIPPED}
    assert skipped["paradigms_agree"] == "traits.paradigms has chunkwise alone"
    assert skipped["steps_equal_the_whole"] == "traits.paradigms has no recurrent"
    assert skipped["documents_are_sequences"] == "traits.packing is False"
    assert "rows_are_independent" not in skipped


def test_without_compiling_no_check_compiles():
    report = check_mixer(RetentionConfig(n_heads=2), examples=1, compiles=False)
    assert {o.check.name for o in report.outcomes} == {c.name for c in CHECKS.values() if not c.compiles}


# ---- what is asked for


@pytest.mark.parametrize("argument", ["checks", "expected_failures"])
def test_a_check_that_is_none_is_told_the_nearest(argument):
    wrong = ["paradigm_agree"] if argument == "checks" else {"paradigm_agree": "?"}
    with pytest.raises(SeqmixError, match=r"there is no check 'paradigm_agree'; .* did you mean \"paradigms_agree\""):
        check_mixer(RetentionConfig(n_heads=2), **{argument: wrong})


def test_a_paradigm_that_is_not_declared_is_told():
    with pytest.raises(ContractError, match="one_way has no paradigm 'recurrent'; it declares chunkwise"):
        check_mixer(OneWayConfig(n_heads=2), paradigms=(Paradigm.RECURRENT,))


def test_a_width_that_does_not_fit_is_told():
    with pytest.raises(SeqmixError, match="2 heads do not divide"):
        check_mixer(RetentionConfig(n_heads=2), d_model=9)
    with pytest.raises(SeqmixError, match=r"retention fits none of the widths 12, 8, .*: 17 heads do not divide"):
        check_mixer(RetentionConfig(n_heads=17))


def test_a_width_is_found():
    report = check_mixer(RetentionConfig(n_heads=8), checks=["paradigms_agree"], examples=1)
    assert report.d_model == 16


def test_one_paradigm_alone_is_compared_with_the_reference(forgetful):
    for paradigm in (Paradigm.CHUNKWISE, Paradigm.RECURRENT):
        failure(forgetful, "pieces_equal_the_whole", paradigms=(Paradigm.RECURRENT,), shrink=False)
        failure(forgetful, "paradigms_agree", paradigms=(paradigm,), shrink=False)


def test_cases_are_a_function_of_the_seed():
    def cases(seed):
        seen.clear()
        check_mixer(RetentionConfig(n_heads=2), checks=["_records_its_cases"], seed=seed, examples=20)
        return list(seen)

    seen = []

    @check(share=1.0)
    def _records_its_cases(trial):
        """Nothing."""
        seen.append(trial.case)

    try:
        first = cases(1)
        assert len(first) == 20
        assert cases(1) == first
        assert cases(2) != first
    finally:
        del CHECKS["_records_its_cases"]


def test_a_check_needs_a_promise_and_a_name_of_its_own():
    def nameless(trial):
        pass

    with pytest.raises(ValueError, match="needs a docstring: the promise"):
        check()(nameless)

    def paradigms_agree(trial):
        """Again."""

    with pytest.raises(ValueError, match="there is a check paradigms_agree already"):
        check()(paradigms_agree)


# ---- as pytest has it


def test_pytest_gets_a_case_for_every_configuration_and_check():
    configs = [RetentionConfig(n_heads=1), RetentionConfig(n_heads=2), AttentionConfig(n_heads=2)]
    mark = parametrize_checks(configs, examples=1, vary=False).mark
    assert mark.args[0] == "check"
    ids = [case.id for case in mark.args[1]]
    assert len(ids) == len(set(ids)) == len(configs) * len(CHECKS)
    assert {"retention0-paradigms_agree", "retention1-paradigms_agree", "attention-paradigms_agree"} <= set(ids)


def bound(config, name, **options):
    """What a pytest function is given as `check`."""
    cases = parametrize_checks([config], examples=5, **options).mark.args[1]
    (found,) = (case.values[0] for case in cases if case.id == f"{config.kind}-{name}")
    return found


def test_pytest_is_told_how_a_check_ended(forgetful):
    bound(RetentionConfig(n_heads=2), "paradigms_agree")()
    with pytest.raises(pytest.fail.Exception, match="forgetful fails paradigms_agree"):
        bound(forgetful, "paradigms_agree")()
    with pytest.raises(pytest.xfail.Exception, match="it forgets"):
        bound(forgetful, "paradigms_agree", expected_failures={"forgetful": {"paradigms_agree": "it forgets"}})()
    with pytest.raises(pytest.skip.Exception, match="packing is False"):
        bound(OneWayConfig(n_heads=2), "documents_are_sequences")()


# ---- what is drawn


def test_options_are_the_values_that_annotations_and_examples_name():
    found = alternatives(RetentionConfig(n_heads=2))
    assert found["n_heads"] == [1, 3]
    assert found["decay"] == ["log_uniform", "constant", "none"]
    assert found["gamma"] == [0.8]
    assert found["row_norm"] == [False]
    assert not {"kind", "paradigm", "chunk_size"} & found.keys()
    assert alternatives(AttentionConfig(n_heads=2, window=3))["window"] == [4, 1, None]


def test_options_that_do_not_go_together_are_none():
    config = RetentionConfig(n_heads=2)
    assert changed(config, {"gamma": 0.8}) is None
    assert changed(config, {"gamma": 0.8, "decay": "constant"}).gamma == 0.8


@pytest.mark.parametrize("kind", [kind for kind in MIXERS.kinds() if MIXERS.origin(kind).startswith("seqmix.")])
def test_all_options_of_the_built_in_mixers_are_varied(kind):
    """A number without examples would stay as it is."""
    config = MIXERS.resolve(kind).example()
    continuous = {"rope_base", "rotation_base", "norm_eps", "eps", "dropout"}
    fixed = {"kind", "paradigm", "chunk_size"}
    assert set(type(config).model_fields) - set(alternatives(config)) <= continuous | fixed


class DeepConfig(RetentionConfig):
    kind: Literal["deep"] = "deep"
    scales: tuple[float, ...] = Field(default=(1.0,), examples=[(0.5, 2.0)])


@pytest.mark.parametrize(
    "value",
    [
        Case(),
        Case(lengths=(0, 3), batch_size=2, start="moved", paradigms=(Paradigm.PARALLEL, Paradigm.CHUNKWISE)),
        Case(rows=(1,), seed=7, dtype=torch.bfloat16, options={"chunk_size": 2, "gamma": None, "decay": "none"}),
        RetentionConfig(n_heads=2, decay="constant", gamma=0.5, paradigm="parallel"),
        LinearAttentionConfig(n_heads=3),
        DeepConfig(n_heads=1, scales=(0.5, 2.0)),
    ],
    ids=source,
)
def test_what_is_written_is_python_that_makes_it(value):
    assert eval(source(value), globals()) == value


def test_every_check_says_what_it_promises():
    assert checks is not None
    for name, found in CHECKS.items():
        assert found.name == name
        assert found.promise.endswith(".")
        assert len(found.promise) > 40
