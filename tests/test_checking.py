"""The check command: what can be checked, what it prints, and its exit status."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from seqmix.ops.kernels import KERNELS, all_kernels
from seqmix.testing import CHECKS

QUICK = ("--only", "paradigms_agree", "--examples", "4")


def test_check_prints_a_line_a_check_and_a_table(seqmix):
    done = seqmix("check", "retention", *QUICK, "--only", "rows_are_independent")
    assert (done.status, done.err) == (0, "")
    heading, agree, independent, *table = done.out.splitlines()
    assert heading == "RetentionConfig(n_heads=2) on cpu, and its options"
    lines = (
        re.fullmatch(rf"  ✓ {name} +(\d+) cases? +\d+\.\d s", line)
        for name, line in (("paradigms_agree", agree), ("rows_are_independent", independent))
    )
    counts = [int(line[1]) for line in lines]
    # a check's share of the examples, and the cases that are run in any case
    assert counts[0] >= 4
    assert counts[1] >= 1
    assert re.search(rf"retention +12 +2 +0 +0 +{sum(counts)} ", "\n".join(table))


def test_check_runs_every_check_unless_told(seqmix):
    done = seqmix("check", "retention", "--examples", "1", "--compile", "none")
    assert done.status == 0
    found = re.findall(r"^  ([✓-]) (\w+) ", done.out, re.M)
    assert [name for _, name in found] == list(CHECKS)
    compiling = {name for name, check in CHECKS.items() if check.compiles}
    assert compiling == {name for mark, name in found if mark == "-"}
    assert len(re.findall("skipped: it compiles, and compiling was left out", done.out)) == len(compiling)


def test_without_shrinking_the_first_case_that_fails_is_told(seqmix):
    Path("forgetful.py").write_text(FORGETFUL)
    check = ("check", "forgetful:ForgetfulConfig", "--only", "paradigms_agree")
    smallest, first = (seqmix(*check, *more).out for more in ((), ("--no-shrink",)))
    assert "Case(start='initial', options={'chunk_size': 3})" in smallest
    assert "Case(start='initial', options={'chunk_size': 3})" not in first
    # cases that shrinking tries are not counted
    assert re.search(r"(\d+) cases", smallest)[1] == re.search(r"(\d+) cases", first)[1]


def test_a_terminal_shows_the_case_that_is_run(seqmix, monkeypatch):
    shown = []
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setattr("rich.status.Status.update", lambda self, text: shown.append(text))
    assert seqmix("check", "retention", *QUICK).status == 0
    assert shown[:2] == ["paradigms_agree: 1 case tried", "paradigms_agree: 2 cases tried"]


@pytest.mark.parametrize(
    ("source", "changes", "headings"),
    [
        ("attention", ("n_heads=4", "window=3"), ["AttentionConfig(n_heads=4, window=3) on cpu"]),
        ("seqmix.mixers.retention:RetentionConfig", (), ["RetentionConfig(n_heads=2) on cpu, and its options"]),
        ("mixer.yaml", (), ["LinearAttentionConfig(n_heads=3, eps=0.1) on cpu"]),
        ("mixer.yaml", ("eps=0.2",), ["LinearAttentionConfig(n_heads=3, eps=0.2) on cpu"]),
        ("run.yaml", (), ["AttentionConfig(n_heads=2) on cpu"]),
        ("hybrid-tiny", (), [r"RetentionConfig\(.*n_heads=2, .*\) on cpu", r"AttentionConfig\(n_heads=4.*\) on cpu"]),
    ],
    ids=["kind with changes", "dotted path", "file of a mixer", "file with changes", "file of a run", "preset"],
)
def test_check_takes_whatever_names_a_mixer(seqmix, source, changes, headings):
    Path("mixer.yaml").write_text("kind: linear_attention\nn_heads: 3\neps: 0.1\n")
    Path("run.yaml").write_text(
        "extends: retnet-tiny\nmodel: {blocks: {ret: {mixer: {kind: attention, n_heads: 2}}}}\n"
    )
    done = seqmix("check", source, *changes, *QUICK)
    assert (done.status, done.err) == (0, "")
    found = [line for line in done.out.splitlines() if " on cpu" in line]
    assert len(found) == len(headings)
    for line, heading in zip(found, headings, strict=True):
        assert line == heading or re.fullmatch(heading, line)


FORGETFUL = """
from typing import Literal

from seqmix.mixers.retention import Retention, RetentionConfig


class ForgetfulConfig(RetentionConfig):
    kind: Literal["forgetful"] = "forgetful"

    def build(self, d_model, *, layer_idx, n_layers):
        return Forgetful(self, d_model)


class Forgetful(Retention):
    def mix(self, x, call):
        return super().mix(x, call._replace(state=None) if call.paradigm == "recurrent" else call)
"""


def test_a_mixer_that_fails_a_check_is_status_1_with_the_smallest_case(seqmix):
    Path("forgetful.py").write_text(FORGETFUL)
    done = seqmix("check", "forgetful:ForgetfulConfig", "--only", "paradigms_agree", "--only", "dtypes_are_kept")
    assert (done.status, done.err) == (1, "")
    assert "  ✗ paradigms_agree" in done.out
    assert "  ✓ dtypes_are_kept" in done.out
    assert "The smallest case: Case(start='initial', options={'chunk_size': 3})" in done.out
    assert 'reproduce("paradigms_agree", config, case, d_model=12)' in done.out
    assert done.out.splitlines()[-1] == "forgetful fails paradigms_agree"


def test_a_paradigm_that_is_right_is_checked_alone(seqmix):
    Path("forgetful.py").write_text(FORGETFUL.replace('"recurrent"', '"parallel"'))
    check = ("check", "forgetful:ForgetfulConfig", "--only", "paradigms_agree")
    assert seqmix(*check, "--paradigm", "chunkwise").status == 0
    assert seqmix(*check, "--paradigm", "parallel").status == 1


def test_cases_are_a_function_of_the_seed(seqmix):
    Path("forgetful.py").write_text(FORGETFUL)
    check = ("check", "forgetful:ForgetfulConfig", "--only", "paradigms_agree")
    first, second = ([re.search(r"(\d+) cases", seqmix(*check, "--seed", s).out)[1] for s in "11"] for _ in range(2))
    assert first == second
    assert len({re.search(r"(\d+) cases", seqmix(*check, "--seed", str(s)).out)[1] for s in range(5)}) > 1


# ---- bad input

BAD_CHECKS = {
    "unknown kind": (["retntion"], "there is no mixer kind, preset or file 'retntion'; .*did you mean \"retention\""),
    "unknown preset": (["retnet-tny"], "there is no mixer kind, preset or file 'retnet-tny'; .* \"retnet-tiny\""),
    "kind of nothing": (["forgetful"], "no mixer kind.*; a mixer of your own is my_module:MyConfig"),
    "module": (["forgetful.py"], "forgetful.py is a module: name its configuration, forgetful:MyConfig"),
    "missing file": (["no.yaml"], "no file no.yaml"),
    "no module": (["nothere:Config"], "No module named 'nothere'"),
    "no mixer": (["forgetful:Forgetful"], "forgetful:Forgetful is .*subclass of .*MixerConfig"),
    "unknown field": (["retention", "n_head=2"], "unknown key 'n_head'; .*did you mean \"n_heads\""),
    "wrong value": (["retention", "n_heads=two"], "n_heads: needs an integer, and was given 'two'"),
    "wrong value in a file": (["bad.yaml"], "bad.yaml:2: n_heads: needs a number > 0, and was given 0"),
    "file of nothing": (["other.yaml"], "unknown key 'name'"),
    "unknown check": (["retention", "--only", "paradigm_agree"], "no check 'paradigm_agree'; .*\"paradigms_agree\""),
    "unknown paradigm": (["retention", "--paradigm", "chunk"], "no paradigm 'chunk'; paradigms: parallel, recurrent"),
    "undeclared paradigm": (
        ["one_way:OneWayConfig", "--paradigm", "parallel"],
        "one_way has no paradigm 'parallel'; it declares chunkwise",
    ),
    "device without numbers": (["retention", "--device", "meta"], "device 'meta' cannot be used here: its tensors"),
    "no class": (["forgetful:"], "'forgetful:' lacks the class after the colon: write my_module:MyConfig"),
    "no module before the colon": ([":MyConfig"], "':MyConfig' lacks the module before the colon"),
    "module that exits": (["leaves:Config"], r"module leaves calls sys.exit\(3\) when it is imported"),
    "empty file": (["empty.yaml"], "empty.yaml is empty: a configuration of a run or of a mixer was expected"),
    "check that is left out": (
        ["retention", "--only", "decoding_compiles_once", "--compile", "none"],
        "--compile none leaves out decoding_compiles_once, which --only asks for",
    ),
    "required field": (
        ["strange:NamelessConfig"],
        r"NamelessConfig: field name is required and has no examples: give name=\.\.\., or declare Field\(examples=",
    ),
    "required field and changes": (["strange:NamelessConfig", "n_heads=2"], "field name is required and has no exam"),
    "example that is refused": (["strange:RefusedConfig"], "field size refuses the first of its own examples: Input"),
    "other example that is refused": (["strange:OtherConfig"], "field size refuses 'no', one of its own examples: Inp"),
    "traits that raise": (
        ["strange:TraitlessConfig"],
        "strange: traits raised AttributeError: .*nope",
    ),
    "build that raises": (
        ["strange:BuildConfig"],
        r"strange: build raised KeyError: .no. \(.*strange.py:\d+, in b",
    ),
    "unknown device": (["retention", "--device", "gpu"], "device 'gpu' cannot be used here"),
    "width that does not fit": (["retention", "--d-model", "7"], "2 heads do not divide expand_k \\* d_model"),
    "no width that fits": (["retention", "n_heads=17"], "retention fits none of the widths 12, 8, 16"),
}

ONE_WAY = """
from dataclasses import replace
from typing import Literal

from seqmix import Paradigm
from seqmix.mixers.retention import RetentionConfig


class OneWayConfig(RetentionConfig):
    kind: Literal["one_way"] = "one_way"

    @property
    def traits(self):
        return replace(super().traits, paradigms=frozenset({Paradigm.CHUNKWISE}))
"""

STRANGE = """
from typing import Literal

from pydantic import Field

from seqmix.mixers.retention import RetentionConfig


class StrangeConfig(RetentionConfig):
    kind: Literal["strange"] = "strange"


class NamelessConfig(StrangeConfig):
    name: str


class RefusedConfig(StrangeConfig):
    size: int = Field(examples=["no"])


class OtherConfig(StrangeConfig):
    size: int = Field(default=2, examples=[3, "no"])


class TraitlessConfig(StrangeConfig):
    @property
    def traits(self):
        return self.nope


class BuildConfig(StrangeConfig):
    def build(self, d_model, *, layer_idx, n_layers):
        return {}["no"]
"""


@pytest.mark.parametrize("case", BAD_CHECKS)
def test_what_cannot_be_checked_is_one_sentence(refused, case):
    Path("forgetful.py").write_text(FORGETFUL)
    Path("one_way.py").write_text(ONE_WAY)
    Path("strange.py").write_text(STRANGE)
    Path("leaves.py").write_text("import sys\n\nsys.exit(3)\n")
    Path("empty.yaml").write_text("# nothing\n")
    Path("bad.yaml").write_text("kind: retention\nn_heads: 0\n")
    Path("other.yaml").write_text("name: me\n")
    arguments, sentence = BAD_CHECKS[case]
    assert re.search(sentence, refused("check", *arguments))


def test_without_hypothesis_check_says_what_to_install(refused, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("seqmix.testing")]:
        monkeypatch.delitem(sys.modules, name)
    # as where it is not installed
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    assert refused("check", "retention") == (
        "check needs hypothesis, which draws the cases: pip install 'seqmix[test]'"
    )


# ---- kernels

STEP = "decay/recurrent/reference"


def test_a_kernel_is_checked_by_its_name(seqmix, monkeypatch):
    done = seqmix("check", STEP, "--only", "outputs_are_the_definitions", "--examples", "2")
    assert (done.status, done.err) == (0, "")
    assert re.fullmatch(r"  ✓ outputs_are_the_definitions +\d+ cases +\d+\.\d s\n", done.out)
    right = all_kernels()[STEP]
    monkeypatch.setitem(KERNELS, right.key, replace(right, function=lambda q, *rest: right.function(2 * q, *rest)))
    done = seqmix("check", STEP, "--only", "outputs_are_the_definitions", "--examples", "2")
    assert done.status == 1
    assert re.search("✗ outputs_are_the_definitions", done.out)
    assert done.out.endswith(f"{STEP} fails outputs_are_the_definitions\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["decay/recurent/reference"], 'there is no kernel .*did you mean "decay/recurrent/reference"'),
        ([STEP, "--d-model", "8"], f"{STEP} is a kernel, and --d-model is for mixers"),
        ([STEP, "window=4"], f"{STEP} is a kernel, and KEY=VALUE is for mixers"),
        ([STEP, "--only", "paradigms_agree"], "there is no check 'paradigms_agree'; checks: outputs_are"),
        (["no/such/file"], "no file no/such/file"),
    ],
)
def test_what_cannot_be_checked_of_a_kernel_is_one_sentence(refused, arguments, sentence):
    assert re.search(sentence, refused("check", *arguments))
