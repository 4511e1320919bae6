"""Reports of the conformance kit about wrong mixers."""

import importlib
import re
import subprocess
import sys
from enum import Enum
from typing import Literal

import pytest
import torch
from pydantic import Field

from seqmix import Paradigm
from seqmix.mixers import MixResult
from seqmix.mixers.base.traits import ContractError
from seqmix.mixers.retention import Retention, RetentionConfig
from seqmix.registry import Config
from seqmix.testing import CHECKS, Case, CheckFailure, Status, check_mixer, reproduce


def snippet_of(outcome):
    return "\n".join(outcome.script)


def test_failure_report_shows_difference_smallest_case_and_reproduction(forgetful, failure):
    counts = []
    outcome = failure(forgetful, "paradigms_agree", on_case=lambda check, count: counts.append((check.name, count)))
    assert outcome.case == Case(start="initial")
    difference, reproduction, *script, about, breaks, remedy = outcome.reason.splitlines()
    assert re.match(
        r"chunkwise against recurrent: the gradient of the state's memory differs at .*: expected ", difference
    )
    assert re.search(r": expected .*, got .*off by up to .* in 144 of 144 elements; allowed: [\d.e-]+\)", difference)
    assert reproduction == "To reproduce:"
    assert script[-2].endswith(repr(outcome.case))
    assert about == f"paradigms_agree: {CHECKS['paradigms_agree'].property}"
    assert remedy == f"If this is intended: {CHECKS['paradigms_agree'].remedy}"
    assert breaks == f"Affected use: {CHECKS['paradigms_agree'].use}"
    with pytest.raises(CheckFailure, match="the state's memory"):
        exec(snippet_of(outcome), {})
    # the cases of an outcome are those until one failed, without those that shrinking tries
    assert counts == [("paradigms_agree", count) for count in range(1, len(counts) + 1)]
    unshrunk = failure(forgetful, "paradigms_agree", shrink=False)
    assert unshrunk.examples == outcome.examples < len(counts)
    assert unshrunk.case != outcome.case


@pytest.mark.parametrize(
    ("check", "case", "place"),
    [
        ("paradigms_agree", Case(lengths=(4,), batch_size=2, start="read"), "the output .* step 0, row 0, channel 0: "),
        (
            "pieces_equal_the_whole",
            Case(lengths=(2, 2), paradigms=(Paradigm.RECURRENT,) * 2),
            "memory .* head 0, .* in heads 0, 1 of 2; ",
        ),
    ],
    ids=["the first step", "heads of a state"],
)
def test_difference_names_its_location(forgetful, check, case, place):
    with pytest.raises(CheckFailure, match=place):
        reproduce(check, forgetful, case)


def test_case_shrinks_to_the_fewest_failing_tokens(mixing, failure):
    def leaks_from_the_third_token_on(inner, x, call):
        y, after = inner(x, call)
        return (y + x[:, 2:3].sum() if x.shape[1] >= 3 else y), after

    outcome = failure(mixing(leaks_from_the_third_token_on), "the_future_changes_nothing")
    assert outcome.case == Case(lengths=(3,))


WRONG_FROM_100_TOKENS_ON = """
from typing import Literal

from seqmix.mixers.retention import Retention, RetentionConfig


class LateConfig(RetentionConfig):
    kind: Literal["late"] = "late"

    def build(self, d_model, *, layer_idx, n_layers):
        return Late(self, d_model)


class Late(Retention):
    def mix(self, x, call):
        y, *others = super().mix(x, call)
        return (WRONG if x.shape[1] >= 100 else y), *others
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "found", "raised"),
    [
        (
            "y + (call.paradigm == 'parallel')",
            "parallel .*the output differs at step 0",
            "CheckFailure: ",
        ),
        ("1 / 0", r"raised ZeroDivisionError: .*late\.py:17, in mix\)", "ZeroDivisionError: "),
    ],
    ids=["another output", "an error"],
)
def test_fixed_case_is_shrunk_and_its_script_reproduces_it(tmp_path, monkeypatch, failure, wrong, found, raised):
    (tmp_path / "late.py").write_text(WRONG_FROM_100_TOKENS_ON.replace("WRONG", wrong))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "late", raising=False)
    config = importlib.import_module("late").LateConfig(n_heads=2)
    outcome = failure(config, "paradigms_agree")
    assert outcome.case == Case(lengths=(100,))
    assert re.search(found, outcome.reason)
    script = [sys.executable, "-c", "\n".join(outcome.script)]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert re.search(rf"^\S*{raised}", done.stderr, re.MULTILINE)


def test_mixer_error_is_reported_with_its_line(mixing, failure):
    def broken(inner, x, call):
        if x.shape[1] > 4:
            raise KeyError("no such weight")
        return inner(x, call)

    outcome = failure(mixing(broken), "paradigms_agree", shrink=False)
    assert re.search(r"KeyError: 'no such weight' \(.*test_reports.py:\d+, in broken\)", outcome.reason)


def test_detached_output_and_state_fail_the_gradient_check(mixing, failure):
    def detached(inner, *given):
        y, after = inner(*given)
        return y.detach(), None if after is None else type(after)(*(leaf.detach() for leaf in after))

    assert "in_proj.weight" in failure(mixing(detached), "gradients_are_derivatives", shrink=False).reason


def test_dependence_on_earlier_calls_is_reported(mixing, failure):
    def flaky(inner, x, call):
        calls.append(1)
        y, after = inner(x, call)
        return y + (len(calls) == 30), after  # one of those that are compared, after sampling

    calls = []
    outcome = failure(mixing(flaky), "results_are_deterministic")
    assert "not a function of its arguments" in outcome.reason
    assert "depends on earlier calls" in outcome.reason
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
            mixer.mix = lambda x, call: MixResult(inner(x, call)[0].flip(1), *inner(x, call)[1:])
        return mixer


@pytest.mark.parametrize(
    ("config", "imported"),
    [
        (ReversingConfig(n_heads=2), {"ReversingConfig", "Mode"}),
        (ReversingConfig(n_heads=2, part=PartConfig(mode=Mode.BACKWARDS)), {"ReversingConfig", "PartConfig", "Mode"}),
    ],
    ids=["an option", "a nested field"],
)
def test_snippet_imports_the_names_it_uses(monkeypatch, failure, config, imported):
    monkeypatch.setitem(sys.modules, __name__, sys.modules[ReversingConfig.__module__])
    snippet = snippet_of(failure(config, "the_future_changes_nothing", examples=300))
    assert set(re.findall(rf"from {__name__} import (\w+)", snippet)) == imported
    with pytest.raises(CheckFailure, match="the output"):
        exec(snippet, {})


def test_snippet_has_all_arguments_and_imports_from_the_running_script(forgetful, monkeypatch, failure):
    monkeypatch.setattr(type(forgetful), "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/folder/my_script.py", raising=False)
    given = {"paradigms": (Paradigm.RECURRENT,), "tolerances": {torch.bfloat16: 0.5}, "d_model": 8}
    # the check compiles nothing
    outcome = failure(forgetful, "paradigms_agree", **given, compile_backend="inductor", shrink=False)
    lines = snippet_of(outcome).splitlines()
    assert {"from seqmix import Paradigm", "import torch", "from my_script import ForgetfulConfig"} <= set(lines)
    assert lines[-1].endswith(
        "config, case, d_model=8, paradigms=(Paradigm.RECURRENT,), tolerances={torch.bfloat16: 0.5})"
    )


SLIPS = {
    "an error": (lambda inner, *given: 1 / 0, "chunkwise .*ZeroDivisionError: .*lambda"),
    "an error inside torch": (
        lambda inner, x, call: inner(torch.nn.functional.linear(x, x[0, :, :5]), call),
        r"RuntimeError: mat1 and .* \(\S*test_reports.py:\d+, in <lambda>\)",
    ),
    "not a pair": (lambda inner, *given: inner(*given)[0], r"\(output, state\).* Tensor"),
    "a width": (lambda inner, *given: (inner(*given)[0][..., :6], None), "shape"),
    "no state": (lambda inner, *given: (inner(*given)[0], None), "chunkwise .* MatrixState .* NoneType"),
    "integers": (lambda inner, *given: (inner(*given)[0].long(), inner(*given)[1]), "chunkwise .* torch.int64"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_mistake_in_every_call_raises_one_error(mixing, bound, slip):
    wrong, named = SLIPS[slip]
    config = mixing(wrong)
    with pytest.raises(ContractError, match=f"^retention: .*{named}"):
        check_mixer(config)
    with pytest.raises(pytest.fail.Exception, match=f"^retention: .*{named}"):
        bound(config, "paradigms_agree")()


def raises(error):
    def build(self, d_model, *, layer_idx, n_layers):
        raise error

    return build


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (raises(KeyError("layers")), r"KeyError: 'layers' \(.*test_reports.py:\d+, in build\)"),
        (raises(ValueError("odd")), "12, 8, .*ValueError: odd "),
        (lambda self, d_model, *, layer_idx, n_layers: None, "SequenceMixer, got None"),
    ],
    ids=["an error", "an error at every width", "not a mixer"],
)
def test_mixer_that_cannot_be_built_raises_one_error(built, build, named):
    with pytest.raises(ContractError, match=f"^retention.*{named}"):
        check_mixer(built(build))


def test_build_that_raises_for_other_options_fails_the_check(built, failure):
    def build(self, d_model, *, layer_idx, n_layers):
        return {"swish": Retention(self, d_model)}[self.gate]

    outcome = failure(built(build), "rows_are_independent", seed=1)
    assert "KeyError: " in outcome.reason
    assert outcome.case.options["gate"] != "swish"


def test_expected_failure_passes_but_unexpected_success_fails(forgetful, failure):
    expected = {"paradigms_agree": "it ignores its state"}
    report = check_mixer(forgetful, checks=["paradigms_agree"], expected_failures=expected)
    (outcome,) = report.outcomes
    assert (outcome.status, outcome.reason) == (Status.EXPECTED_FAILURE, "it ignores its state")
    assert report.passed
    expected = {"the_future_changes_nothing": "it looks ahead"}
    outcome = failure(RetentionConfig(n_heads=2), "the_future_changes_nothing", expected_failures=expected)
    assert outcome.reason.endswith("to fail (it looks ahead), but it passed: remove it from expected_failures")
