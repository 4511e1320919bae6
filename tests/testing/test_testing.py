"""The conformance kit itself: what it reports of a wrong mixer, what it skips, and what it draws."""

import importlib
import re
import sys
import textwrap
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import Literal, get_args, get_origin

import pytest
import torch
from hypothesis import core, settings
from hypothesis.internal.conjecture import providers
from pydantic import Field
from torch import nn

from seqmix import MIXERS, Paradigm
from seqmix.mixers.attention import AttentionConfig
from seqmix.mixers.linear_attention import LinearAttentionConfig
from seqmix.mixers.retention import Retention, RetentionConfig
from seqmix.mixers.traits import ContractError
from seqmix.registry import Config, SeqmixError
from seqmix.testing import (
    CHECKS,
    Case,
    CheckFailure,
    Outcome,
    Status,
    check,
    check_mixer,
    parametrize_checks,
    parametrize_kernels,
    reproduce,
)
from seqmix.testing.mixer_options import alternatives, changed, chunk_sizes
from seqmix.testing.outcome import Outcomes
from seqmix.testing.source import source

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
    def mix(self, x, call):
        return super().mix(x, call._replace(state=None) if call.paradigm is Paradigm.RECURRENT else call)
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
    def leaks_from_the_third_token_on(self, x, call):
        y, after = original(self, x, call)
        return (y + x[:, 2:3].sum() if x.shape[1] >= 3 else y), after

    original = Retention.mix
    monkeypatch.setattr(Retention, "mix", leaks_from_the_third_token_on)
    outcome = failure(RetentionConfig(n_heads=2), "the_future_changes_nothing")
    assert outcome.case.length == 3
    assert (outcome.case.batch_size, outcome.case.start, outcome.case.seed) == (1, "none", 0)


def mixing(monkeypatch, wrong):
    """Let retention do something else: `wrong(inner, x, call)`."""
    inner = Retention.mix
    monkeypatch.setattr(Retention, "mix", lambda self, x, call: wrong(partial(inner, self), x, call))


def test_an_error_of_the_mixer_is_told_with_its_line(monkeypatch):
    def broken(inner, x, call):
        if x.shape[1] > 4:
            raise KeyError("no such weight")
        return inner(x, call)

    mixing(monkeypatch, broken)
    outcome = failure(RetentionConfig(n_heads=2), "paradigms_agree", shrink=False)
    assert re.search(r"raised KeyError: 'no such weight' \(.*test_testing.py:\d+, in broken\)", outcome.reason)


def test_an_error_inside_torch_is_told_with_the_line_that_called_it(monkeypatch):
    mixing(monkeypatch, lambda inner, x, call: inner(torch.nn.functional.linear(x, x[0, :, :5]), call))
    with pytest.raises(ContractError, match=r"RuntimeError: mat1 and .* \(\S*test_testing.py:\d+, in <lambda>\)"):
        check_mixer(RetentionConfig(n_heads=2))


def test_what_passes_once_and_fails_once_is_told(monkeypatch):
    def flaky(inner, x, call):
        calls.append(1)
        y, after = inner(x, call)
        return y + (len(calls) == 6), after  # three calls were made before any check

    calls = []
    mixing(monkeypatch, flaky)
    outcome = failure(RetentionConfig(n_heads=2), "results_are_deterministic")
    assert "the same case passed once and failed once" in outcome.reason
    assert "Alone and on a new mixer this case passes: the result depends on earlier calls" in outcome.reason
    assert not re.search("hypothesis|falsifying|Flaky|strategy", outcome.reason, re.I)
    assert "checks=[" in outcome.reason
    assert "reproduce(" not in outcome.reason


class Mode(Enum):
    FORWARDS = "forwards"
    BACKWARDS = "backwards"


class PartConfig(Config):
    mode: Mode = Field(default=Mode.FORWARDS, strict=False)


class ReversingConfig(RetentionConfig):
    kind: Literal["reversing"] = "reversing"
    mode: Mode = Field(default=Mode.FORWARDS, strict=False, examples=[Mode.BACKWARDS])
    part: PartConfig = PartConfig()

    def build(self, d_model, *, layer_idx, n_layers):
        mixer = Retention(self, d_model)
        inner = mixer.mix
        if Mode.BACKWARDS in (self.mode, self.part.mode):
            mixer.mix = lambda x, call: (inner(x, call)[0].flip(1), inner(x, call)[1])
        return mixer


@pytest.mark.parametrize(
    ("config", "imported"),
    [
        (ReversingConfig(n_heads=2), {"ReversingConfig", "Mode"}),
        (ReversingConfig(n_heads=2, part=PartConfig(mode=Mode.BACKWARDS)), {"ReversingConfig", "PartConfig", "Mode"}),
    ],
    ids=["an option", "a nested field"],
)
def test_a_snippet_imports_what_it_names(monkeypatch, config, imported):
    monkeypatch.setitem(sys.modules, __name__, sys.modules[ReversingConfig.__module__])
    outcome = failure(config, "the_future_changes_nothing", seed=1)
    _, _, snippet = outcome.reason.partition("To reproduce:\n")
    assert set(re.findall(rf"from {__name__} import (\w+)", snippet)) == imported
    with pytest.raises(CheckFailure, match="the output"):
        exec(textwrap.dedent(snippet), {})


def test_a_snippet_has_all_that_was_asked_for(forgetful):
    asked = {"paradigms": (Paradigm.RECURRENT,), "tolerances": {torch.bfloat16: 0.5}, "d_model": 8}
    outcome = failure(forgetful, "paradigms_agree", **asked, compile_backend="inductor")
    *_, call = outcome.reason.splitlines()
    assert call.endswith(
        "config, case, d_model=8, paradigms=(Paradigm.RECURRENT,), tolerances={torch.bfloat16: 0.5})"
    )  # the check compiles nothing
    assert "    from seqmix import Paradigm\n    import torch\n" in outcome.reason


def test_a_class_of_the_script_that_runs_is_imported_from_its_file(forgetful, monkeypatch):
    monkeypatch.setattr(type(forgetful), "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/folder/my_script.py", raising=False)
    outcome = failure(forgetful, "paradigms_agree", shrink=False)
    assert "    from my_script import ForgetfulConfig" in outcome.reason.splitlines()


def test_the_cases_of_an_outcome_are_those_until_one_failed(forgetful):
    tried = []
    (outcome,) = check_mixer(
        forgetful, checks=["paradigms_agree"], on_case=lambda check, count: tried.append((check.name, count))
    ).outcomes
    assert tried == [("paradigms_agree", count) for count in range(1, len(tried) + 1)]
    assert outcome.examples < len(tried)
    (unshrunk,) = check_mixer(forgetful, checks=["paradigms_agree"], shrink=False).outcomes
    assert unshrunk.examples == outcome.examples


def test_output_and_state_without_any_gradient_are_a_failure(monkeypatch):
    def detached(inner, *given):
        y, after = inner(*given)
        return y.detach(), None if after is None else type(after)(*(leaf.detach() for leaf in after))

    mixing(monkeypatch, detached)
    outcome = failure(RetentionConfig(n_heads=2), "paradigms_agree", shrink=False)
    assert outcome.reason.splitlines()[1] == "neither output nor final state has a gradient"


# ---- what no check could make sense of

SLIPS = {
    "an error": (lambda inner, *given: 1 / 0, "a call in the chunkwise paradigm raised ZeroDivisionError: .*lambda"),
    "no pair": (lambda inner, *given: inner(*given)[0], r"mix has to return \(output, state\), and returned a Tensor"),
    "a width": (
        lambda inner, *given: (inner(*given)[0][..., :6], None),
        "mix has to return an output of the segment's shape",
    ),
    "no state": (
        lambda inner, *given: (inner(*given)[0], None),
        "the chunkwise paradigm has to return a MatrixState as the final state, .* returned a NoneType",
    ),
    "integers": (
        lambda inner, *given: (inner(*given)[0].long(), inner(*given)[1]),
        "the chunkwise paradigm returned an output of torch.int64",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_what_is_wrong_with_every_call_is_one_sentence(monkeypatch, slip):
    wrong, sentence = SLIPS[slip]
    mixing(monkeypatch, wrong)
    with pytest.raises(ContractError, match=f"^retention: {sentence}"):
        check_mixer(RetentionConfig(n_heads=2))
    with pytest.raises(pytest.fail.Exception, match=f"^retention: {sentence}"):
        bound(RetentionConfig(n_heads=2), "paradigms_agree")()


def built(build):
    """A configuration that builds so."""
    return type("BuiltConfig", (RetentionConfig,), {"build": build, "__module__": __name__})(n_heads=1)


def raises(error):
    def build(self, d_model, *, layer_idx, n_layers):
        raise error

    return build


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (raises(KeyError("layers")), r"retention: build raised KeyError: 'layers' \(.*test_testing.py:\d+, in build\)"),
        (
            raises(ValueError("odd")),
            "retention fits none of the widths 12, 8, .*: build raised ValueError: odd ",
        ),
        (lambda self, d_model, layer_idx: None, "build raised TypeError: .* unexpected keyword argument 'n_layers'"),
        (lambda self, d_model, *, layer_idx, n_layers: None, "build returned None, which is no SequenceMixer"),
    ],
    ids=["an error", "an error at every width", "signature", "no mixer"],
)
def test_a_build_that_fails_is_one_sentence(build, sentence):
    with pytest.raises(ContractError, match=sentence):
        check_mixer(built(build))


def test_an_assertion_about_the_width_leaves_others_to_try():
    def build(self, d_model, *, layer_idx, n_layers):
        assert d_model % 16 == 0
        return Retention(self, d_model)

    assert check_mixer(built(build), checks=["dtypes_are_kept"], examples=1).d_model == 16


def test_a_build_that_raises_with_other_options_is_a_failure():
    def build(self, d_model, *, layer_idx, n_layers):
        return {"swish": Retention(self, d_model)}[self.gate]

    outcome = failure(built(build), "rows_are_independent", seed=1)
    assert "build raised KeyError: " in outcome.reason
    assert outcome.case.options["gate"] != "swish"


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
    compiling = [name for name, check in CHECKS.items() if check.compiles]
    outcomes = check_mixer(RetentionConfig(n_heads=2), checks=compiling, compiles=False).outcomes
    assert len(outcomes) == len(compiling) > 0
    assert {(o.status, o.reason) for o in outcomes} == {(Status.SKIPPED, "it compiles, and compiling was left out")}


# ---- what is asked for


@pytest.mark.parametrize("argument", ["checks", "expected_failures"])
def test_a_check_that_is_none_is_told_the_nearest(argument):
    wrong = ["paradigm_agree"] if argument == "checks" else {"paradigm_agree": "?"}
    with pytest.raises(SeqmixError, match=r"there is no check 'paradigm_agree'; .* did you mean \"paradigms_agree\""):
        check_mixer(RetentionConfig(n_heads=2), **{argument: wrong})


def test_a_paradigm_that_is_not_declared_is_told():
    with pytest.raises(ContractError, match="one_way has no paradigm 'recurrent'; it declares chunkwise"):
        check_mixer(OneWayConfig(n_heads=2), paradigms=(Paradigm.RECURRENT,))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"paradigms": "recurrent"}, r"paradigms needs a tuple, and was given 'recurrent': write \('recurrent',\)"),
        ({"paradigms": Paradigm.RECURRENT}, "paradigms needs a tuple, and was given 'recurrent'"),
        ({"paradigms": ()}, "paradigms names none"),
        ({"paradigms": ("recurent",)}, "has no paradigm 'recurent'; .* did you mean \"recurrent\""),
        ({"device": "meta"}, "device 'meta' cannot be used here: its tensors have no numbers"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here: "),
        ({"device": "gpu"}, "device 'gpu' cannot be used here: "),
        ({"d_model": 0}, "d_model needs an integer >= 1, and was given 0"),
        ({"tolerances": {"bfloat16": 1}}, r"tolerances has no dtype 'bfloat16'; allowed: torch.float32, "),
        ({"examples": 0}, "examples needs an integer >= 1, and was given 0"),
        ({"examples": -5}, "examples needs an integer >= 1, and was given -5"),
        ({"checks": []}, "checks names none, so nothing would be checked"),
        ({"checks": "paradigms_agree"}, r"checks needs a list of names, .*: write \['paradigms_agree'\]"),
    ],
    ids=str,
)
def test_what_is_asked_for_wrongly_is_told(options, sentence):
    with pytest.raises(SeqmixError, match=sentence):
        check_mixer(RetentionConfig(n_heads=2), **options)


def test_a_class_is_no_configuration():
    with pytest.raises(ContractError, match=r"configuration of a mixer, and was given as .*, which is a class: call"):
        check_mixer(RetentionConfig)


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


def test_a_paradigm_that_is_not_asked_for_is_not_tested(monkeypatch):
    def shifted(inner, x, call):
        y, after = inner(x, call)
        return y + (call.paradigm is Paradigm.CHUNKWISE), after

    mixing(monkeypatch, shifted)
    # the default is chunkwise
    for paradigm in ("parallel", "recurrent"):
        asked = {"paradigms": (paradigm,), "examples": 6}
        names = ["pieces_equal_the_whole", "the_initial_state_is_nothing_read"]
        report = check_mixer(RetentionConfig(n_heads=2), checks=names, **asked)
        assert report.passed, report.failures[0].reason
    failure(RetentionConfig(n_heads=2), "pieces_equal_the_whole", paradigms=(Paradigm.CHUNKWISE,), shrink=False)


class UnfilledConfig(RetentionConfig):
    """Of memory that only reset_parameters fills."""

    kind: Literal["unfilled"] = "unfilled"

    def build(self, d_model, *, layer_idx, n_layers):
        mixer = super().build(d_model, layer_idx=layer_idx, n_layers=n_layers)
        mixer.out_proj.weight = nn.Parameter(torch.empty_like(mixer.out_proj.weight))
        return mixer


def test_a_mixer_that_is_built_alone_is_initialised():
    (outcome,) = check_mixer(UnfilledConfig(n_heads=2), checks=["every_parameter_is_initialised"]).outcomes
    assert "built alone, out_proj.weight is uninitialised: end __init__ with self.reset_parameters()" in outcome.reason


@pytest.fixture
def cases():
    """The cases that a check is given, by the seed."""

    seen = []

    @check(share=1.0)
    def _records_its_cases(trial):
        """Nothing."""
        seen.append(trial.case)

    def of(seed, examples=20):
        seen.clear()
        check_mixer(RetentionConfig(n_heads=2), checks=["_records_its_cases"], seed=seed, examples=examples)
        return list(seen)

    yield of
    del CHECKS["_records_its_cases"]


def test_cases_are_a_function_of_the_seed(cases):
    first = cases(1)
    assert len(first) == 20
    assert cases(1) == first
    assert cases(2) != first


def test_what_is_imported_does_not_change_the_cases(cases, tmp_path, monkeypatch):
    """Hypothesis takes numbers from the source of modules that happen to be there."""
    first = [cases(seed, examples=100) for seed in range(8)]
    numbers = ", ".join(str(n) for n in range(101, 2**16, 131))
    (tmp_path / "full_of_numbers.py").write_text(f"NUMBERS = [{numbers}]\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("full_of_numbers")
    monkeypatch.setattr(providers, "is_local_module_file", lambda path: path.endswith("full_of_numbers.py"))
    providers.CONSTANTS_CACHE.cache.clear()
    assert [cases(seed, examples=100) for seed in range(8)] == first


def test_a_check_needs_a_property_and_a_name_of_its_own():
    def nameless(trial):
        pass

    with pytest.raises(ValueError, match="needs a docstring: the property"):
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


def ids(mark):
    return [case.id for case in mark.mark.args[1]]


def test_pytest_gets_the_checks_that_are_asked_for():
    config, names = RetentionConfig(n_heads=2), ["rows_are_independent", "paradigms_agree"]
    assert ids(parametrize_checks([config], checks=names)) == [f"retention-{name}" for name in reversed(names)]
    with pytest.raises(SeqmixError, match="there is no check 'row_are_independent'"):
        parametrize_checks([config], checks=["row_are_independent"])
    for given in ({"checks": []}, {"expected_failures": {}}):
        with pytest.raises(SeqmixError, match=f"{next(iter(given))} is given where tests are made of checks"):
            bound(config, "paradigms_agree")(**given)
    (kernel_id, *others) = ids(parametrize_kernels(checks=["results_are_deterministic"]))
    assert all(name.endswith("-results_are_deterministic") for name in (kernel_id, *others))


def test_a_check_that_is_left_out_is_skipped():
    with pytest.raises(pytest.skip.Exception, match="it compiles, and compiling was left out"):
        bound(RetentionConfig(n_heads=2), "decoding_compiles_once", compiles=False)()


@pytest.mark.parametrize(
    ("expected", "sentence"),
    [
        ({"retntion": {}}, "names the kind 'retntion', which is not tested here; tested: .* mean \"retention\""),
        ({"retention": {"row_are_independent": "?"}}, "there is no check 'row_are_independent'"),
    ],
)
def test_what_is_expected_of_nothing_is_refused(expected, sentence):
    with pytest.raises(SeqmixError, match=sentence):
        parametrize_checks([RetentionConfig(n_heads=2)], expected_failures=expected)
    of_a_kernel = {name.replace("retention", "decay/chunkwise/reference"): value for name, value in expected.items()}
    with pytest.raises(SeqmixError, match=r"names the kernel 'retntion'|there is no check 'row_are_independent'"):
        parametrize_kernels(expected_failures=of_a_kernel)


@pytest.mark.parametrize("configs", [[], RetentionConfig(n_heads=2), [RetentionConfig]])
def test_nothing_to_test_is_refused(configs):
    with pytest.raises(SeqmixError, match=r"parametrize_checks (was given no configuration|needs a list of config)"):
        parametrize_checks(configs)


def test_a_suite_draws_the_same_cases_in_every_run(monkeypatch):
    def record(**options):
        seen.update(options)
        return Outcomes(outcomes=[Outcome(CHECKS["paradigms_agree"], Status.PASSED)])

    def seed():
        seen.clear()
        call()
        return seen["seed"]

    seen = {}
    call = replace(bound(RetentionConfig(n_heads=2), "paradigms_agree"), run=record)
    assert seed() == 0
    monkeypatch.setattr(core, "global_force_seed", 7)
    assert seed() is None
    monkeypatch.undo()
    # a profile of the project's own
    monkeypatch.setattr(settings, "_current_profile", "nightly")
    assert seed() is None


# ---- what is drawn


class ChunksConfig(RetentionConfig):
    kind: Literal["chunks"] = "chunks"
    chunk_size: int = Field(default=128, ge=128)


class TiledConfig(RetentionConfig):
    kind: Literal["tiled"] = "tiled"
    chunk_size: int = Field(default=64, ge=16, multiple_of=16, examples=[32])


class ListedConfig(RetentionConfig):
    kind: Literal["listed"] = "listed"
    chunk_size: Literal[32, 64] = 64


@pytest.mark.parametrize(
    ("config", "sizes"),
    [(ChunksConfig(n_heads=2), [128]), (TiledConfig(n_heads=2), [64, 32]), (ListedConfig(n_heads=2), [64, 32])],
    ids=lambda value: getattr(value, "kind", None),
)
def test_chunk_sizes_are_those_that_the_configuration_takes(config, sizes):
    assert chunk_sizes(config) == sizes
    names = ["paradigms_agree", "chunk_size_changes_nothing"]
    report = check_mixer(config, checks=names, examples=3)
    assert report.passed, report.failures[0].reason


def test_chunk_sizes_that_building_refuses_are_not_drawn():
    def build(self, d_model, *, layer_idx, n_layers):
        if self.chunk_size % 64:
            raise ContractError("chunks are whole tiles")
        return Retention(self, d_model)

    names = ["rows_are_independent", "chunk_size_changes_nothing"]
    report = check_mixer(built(build), checks=names, examples=2, vary=False)
    assert report.passed, report.failures[0].reason


class OneOfThreeConfig(RetentionConfig):
    kind: Literal["one_of_three"] = "one_of_three"
    paradigm: Literal[Paradigm.PARALLEL] = Paradigm.PARALLEL


def test_a_declared_paradigm_that_the_configuration_refuses_is_told():
    outcome = failure(OneOfThreeConfig(n_heads=2), "configurations_round_trip")
    assert outcome.reason.splitlines()[1] == ("the configuration refuses paradigm=chunkwise, which its traits declare")


class RefusedConfig(RetentionConfig):
    kind: Literal["refused"] = "refused"
    width: int = Field(default=2, examples=["no", 3])


def test_an_example_that_its_field_refuses_is_told():
    with pytest.raises(ContractError, match=r"RefusedConfig: field width refuses 'no', one of its own examples: Input"):
        check_mixer(RefusedConfig(n_heads=2))


def test_a_frozen_parameter_needs_no_gradient(monkeypatch):
    frozen = Retention.reset_parameters

    def reset(self):
        frozen(self)
        next(self.parameters()).requires_grad_(False)

    monkeypatch.setattr(Retention, "reset_parameters", reset)
    report = check_mixer(RetentionConfig(n_heads=2), compiles=False, examples=1, vary=False)
    assert report.passed, report.failures[0].reason


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
    of_the_start = {"a_range", "time_step_range", "decay_range", "decay_shift", "sine_frequency"}
    fixed = {"kind", "paradigm", "chunk_size", "backend"}
    types = {name: field.annotation for name, field in type(config).model_fields.items()}
    single = {name for name, cls in types.items() if get_origin(cls) is Literal and len(get_args(cls)) == 1}
    unvaried = types.keys() - alternatives(config).keys()
    assert unvaried <= continuous | of_the_start | fixed | single


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


def test_every_check_says_its_property():
    for name, found in CHECKS.items():
        assert found.name == name
        assert found.property.endswith(".")
        assert len(found.property) > 40
