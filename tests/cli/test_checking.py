"""The check command: what it accepts, what it prints, and its exit status."""

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import seqmix.testing
from seqmix import __version__ as seqmix_version
from seqmix.ops.runtime.kernel import KERNELS, all_kernels
from seqmix.testing import CHECKS

QUICK = ("--only", "paradigms_agree", "--examples", "4")
STEP = "decay/recurrent/reference"
SMALLEST = "case = Case(start='initial')\n"


@pytest.fixture
def forgetful(seqmix):
    """Check a wrong mixer."""
    Path("forgetful.py").write_text((Path(__file__).parents[1] / "helpers" / "forgetful_mixer.py").read_text())
    return lambda *options: seqmix("check", "forgetful:ForgetfulConfig", "--only", "paradigms_agree", *options)


def test_check_prints_one_line_per_check_and_a_table(seqmix):
    done = seqmix("check", "retention", *QUICK, "--only", "rows_are_independent")
    assert (done.status, done.err) == (0, "")
    heading, *lines = done.out.splitlines()
    assert heading.startswith("RetentionConfig(n_heads=2) on cpu")
    names = ("paradigms_agree", "rows_are_independent")
    counts = [int(re.match(rf"  ✓ {name} +(\d+) cases? ", line)[1]) for name, line in zip(names, lines, strict=False)]
    # a check's share of the examples, and the cases that run in any case
    assert counts[0] >= 3
    assert counts[1] >= 1
    assert re.search(rf"retention +12 +2 +0 +0 +0 +{sum(counts)} ", done.out)


@pytest.mark.slow
def test_quick_skips_slow_checks_and_stress_adds_more(seqmix):
    contract = {name: check for name, check in CHECKS.items() if not check.stress}
    slow = [name for name, check in contract.items() if check.compiles]
    slow += [name for name, check in contract.items() if check.long]
    compiling = {name for name, check in CHECKS.items() if check.compiles}
    # positions count in retention, which divides by the number of tokens
    of_others = {"an_unseen_prefix_changes_nothing"}
    for options, names, skipped in (
        (["--quick"], [name for name in contract if name not in slow], of_others),
        (["--compile=none"], list(contract), of_others | compiling & contract.keys()),
        (["--compile=none", "--stress"], list(CHECKS), of_others | compiling),
    ):
        done = seqmix("check", "retention", "--examples", "1", *options)
        assert done.status == 0
        found = re.findall(r"^  ([✓-]) (\w+) ", done.out, re.M)
        assert [name for _, name in found] == names
        assert {name for mark, name in found if mark == "-"} == skipped
        without = f"quick: 1 examples (the default is 100), and without {', '.join(slow)}\n"
        assert (without in done.out) == (options == ["--quick"])


def test_quick_option_still_finds_a_fault_in_a_non_default_field(seqmix):
    """Each non-default value is tried once, even with few examples."""
    Path("inherits.py").write_text(INHERITS)
    done = seqmix("check", "inherits:InheritsConfig", "--quick", "--only", "position_matters_only_where_declared")
    assert done.status == 1
    assert "'absolute': True" in done.out
    assert "If this is intended: declare traits.shift_invariant=False" in done.out


INHERITS = """
from typing import Literal

import torch

from seqmix.mixers.retention import Retention, RetentionConfig


class InheritsConfig(RetentionConfig):
    kind: Literal["inherits"] = "inherits"
    n_heads: int = 2
    row_norm: bool = False
    absolute: bool = False

    def build(self, d_model, *, layer_idx, n_layers):
        return Inherits(self, d_model)


class Inherits(Retention):
    def mix(self, x, call):
        if not self.config.absolute:
            return super().mix(x, call)
        before = self.init_state(call.rows(len(x))) if call.state is None else call.state
        turned = call.positions(x, before.position)[..., None].to(x.dtype).cos()
        return super().mix(x + turned, call)
"""


def test_failure_exits_with_status_1_and_the_smallest_case(forgetful):
    done = forgetful("--only", "dtypes_are_kept")
    assert (done.status, done.err) == (1, "")
    assert "  ✗ paradigms_agree" in done.out
    assert "  ✓ dtypes_are_kept" in done.out
    assert SMALLEST in done.out
    assert 'reproduce("paradigms_agree", config, case, d_model=12)' in done.out
    assert done.out.splitlines()[-1] == "forgetful fails paradigms_agree"
    first = forgetful("--no-shrink").out
    assert SMALLEST not in first
    # cases that shrinking tries are not counted
    assert re.search(r"(\d+) cases?", done.out)[1] == re.search(r"(\d+) cases?", first)[1]


def test_results_are_written_as_json_and_junit_files(forgetful, monkeypatch):
    def raising(*_):
        raise RuntimeError("\x1b[1m<no state> &")

    monkeypatch.setattr("seqmix.mixers.retention.Retention.resize_state", raising)
    options = (
        "dtypes_are_kept",
        "--only",
        "a_state_survives_the_disk",
        "--seed",
        "3",
        "--examples",
        "4",
        "--no-shrink",
    )
    files = ("--json", "found.json", "--junit", "found.xml")
    assert forgetful("--only", *options, *files, "--expected-failure", "paradigms_agree=no state").status == 1
    found = json.loads(Path("found.json").read_text())
    assert (found["seqmix"], found["torch"], found["seed"]) == (seqmix_version, torch.__version__, 3)
    (tested,) = found["tested"]
    assert (tested["kind"], tested["d_model"], tested["config"]["n_heads"]) == ("forgetful", 12, 2)
    checks = {check["name"]: check for check in tested["checks"]}
    assert [check["status"] for check in checks.values()] == ["expected failure", "failed", "passed"]
    assert checks["paradigms_agree"]["reason"] == "no state"
    failed = checks["a_state_survives_the_disk"]
    assert failed["property"] == CHECKS["a_state_survives_the_disk"].property
    assert failed["use"] == CHECKS["a_state_survives_the_disk"].use
    assert failed["case"] in failed["reproduce"][-2]
    assert failed["examples"] > 0
    assert failed["seconds"] > 0
    (suite,) = ElementTree.parse("found.xml").getroot()
    counts = {name: suite.get(name) for name in ("name", "tests", "failures", "errors", "skipped")}
    assert counts == {"name": "forgetful", "tests": "3", "failures": "1", "errors": "0", "skipped": "1"}
    ends = {case.get("name"): [(end.tag, end.get("message")) for end in case] for case in suite}
    assert ends["dtypes_are_kept"] == []
    assert ends["paradigms_agree"] == [("skipped", "expected failure: no state")]
    assert "?[1m<no state> &" in suite.find(".//failure").text
    assert not list(Path().glob("*partial*"))


def test_tolerance_and_expected_failure_options_take_effect(forgetful):
    assert forgetful("--expected-failure", "paradigms_agree=it ignores its state").status == 0
    done = forgetful("--tolerance", "bfloat16=1e-9", "--tolerance", "float32=0.1")
    assert "tolerances={torch.bfloat16: 1e-09, torch.float32: 0.1})\n" in done.out


def test_correct_paradigm_passes_when_checked_alone(seqmix, forgetful):
    Path("swapped.py").write_text(Path("forgetful.py").read_text().replace("RECURRENT", "PARALLEL"))
    check = ("check", "swapped:ForgetfulConfig", "--only", "paradigms_agree", "--no-shrink")
    assert seqmix(*check, "--paradigm", "chunkwise").status == 0
    assert seqmix(*check, "--paradigm", "parallel").status == 1


def test_seed_and_number_of_examples_are_passed_on(forgetful, monkeypatch):
    def recording(config, **options):
        asked.append((options["seed"], options["examples"]))
        return check_mixer(config, **options)

    asked, check_mixer = [], seqmix.testing.check_mixer
    monkeypatch.setattr(seqmix.testing, "check_mixer", recording)
    forgetful("--seed", "3", "--examples", "7", "--no-shrink")
    forgetful("--quick", "--no-shrink")
    assert asked == [(3, 7), (0, 10)]


def test_terminal_shows_the_running_case(seqmix, monkeypatch):
    shown = []
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setattr("rich.status.Status.update", lambda self, text: shown.append(text))
    assert seqmix("check", "retention", *QUICK).status == 0
    assert [re.findall(r"paradigms_agree: (\d) ", text) for text in shown[:2]] == [["1"], ["2"]]


@pytest.mark.parametrize(
    ("source", "changes", "headings"),
    [
        ("attention", ("n_heads=4", "window=3"), ["AttentionConfig(n_heads=4, window=3) on cpu"]),
        (
            "seqmix.mixers.mamba2:Mamba2Config",
            (),
            [r"Mamba2Config\(.*\) on cpu, and its options \(but time_step_range, a_range: no examples are declared\)"],
        ),
        ("mixer.yaml", (), ["LinearAttentionConfig(n_heads=3, eps=0.1) on cpu"]),
        ("mixer.yaml", ("eps=0.2",), ["LinearAttentionConfig(n_heads=3, eps=0.2) on cpu"]),
        ("run.yaml", (), ["AttentionConfig(n_heads=2) on cpu"]),
        ("hybrid-tiny", (), [r"RetentionConfig\(.*n_heads=2, .*\) on cpu", r"AttentionConfig\(n_heads=4.*\) on cpu"]),
    ],
    ids=["kind with changes", "dotted path", "file of a mixer", "file with changes", "file of a run", "preset"],
)
def test_check_accepts_kinds_paths_files_and_presets(seqmix, source, changes, headings):
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


BAD_CHECKS = {
    "unknown kind": (["retntion"], "'retntion'.*\"retention\""),
    "a module's name as a kind": (["forgetful"], "'forgetful'.*my_module:MyConfig"),
    "a module's file": (["forgetful.py"], "forgetful.py .*forgetful:MyConfig"),
    "missing file": (["no.yaml"], "no.yaml"),
    "missing module": (["nothere:Config"], "'nothere'"),
    "not a configuration": (["forgetful:Forgetful"], "forgetful:Forgetful' .*MixerConfig"),
    "a function": (["makes:layer"], r"makes:layer is a function.*adapt\(layer\)"),
    "no class": (["forgetful:"], "'forgetful:' .*my_module:MyConfig"),
    "no module before the colon": ([":MyConfig"], "':MyConfig' .*module"),
    "module that exits": (["leaves:Config"], r"leaves .*sys.exit\(3\)"),
    "wrong value in a file": (["bad.yaml"], "bad.yaml:2: n_heads: .* 0"),
    "a file of neither": (["other.yaml"], "'name'"),
    "empty file": (["empty.yaml"], "empty.yaml .*empty"),
    "unknown check": (["retention", "--only", "paradigm_agree"], "'paradigm_agree'.*\"paradigms_agree\""),
    "check that is left out": (
        ["retention", "--only", "decoding_compiles_once", "--compile", "none"],
        "--compile none .*decoding_compiles_once.*--only",
    ),
    "check that --quick leaves out": (
        ["retention", "--only", "decoding_compiles_once", "--quick"],
        "--quick .*decoding_compiles_once.*--only",
    ),
    "expected failure of no check": (
        ["retention", "--expected-failure", "paradigm_agree=why"],
        "'paradigm_agree'.*\"paradigms_agree\"",
    ),
    "expected failure without a reason": (
        ["retention", "--expected-failure", "paradigms_agree="],
        "CHECK=REASON.*'paradigms_agree='",
    ),
    "unknown dtype": (["retention", "--tolerance", "bfloat=1"], "'bfloat'.*\"bfloat16\".*float16"),
    "tolerance of zero": (["retention", "--tolerance", "bfloat16=0"], "bfloat16 .*above 0.*'0'"),
    "tolerance without a number": (["retention", "--tolerance", "bfloat16=big"], "bfloat16 .*above 0.*'big'"),
    "a folder as a file": (["retention", "--json", "."], "folder"),
    "tolerance of a kernel": ([STEP, "--tolerance", "float32=1"], f"{STEP} .*--tolerance"),
    "unknown paradigm": (["retention", "--paradigm", "chunk"], "'chunk'.*parallel, recurrent"),
    "undeclared paradigm": (["strange:OneWayConfig", "--paradigm", "parallel"], "'parallel'.*chunkwise"),
    "unknown device": (["retention", "--device", "gpu"], "'gpu'"),
    "width that does not fit": (["retention", "--d-model", "7"], "2 heads .*d_model = .* 7"),
    "required field": (["strange:NamelessConfig"], r"NamelessConfig: .* name .*name=\.\.\..*examples="),
    "example that is refused": (["strange:RefusedConfig"], " size .*example"),
    "traits that raise": (["strange:TraitlessConfig"], "strange: traits .*AttributeError: .*nope"),
    "build that raises": (["strange:BuildConfig"], r"strange: build .*KeyError: .no. \(.*strange.py:\d+, in b"),
    "unknown kernel": (["decay/recurent/reference"], f'"{STEP}"'),
    "d_model of a kernel": ([STEP, "--d-model", "8"], f"{STEP} .*--d-model"),
    "changes of a kernel": ([STEP, "window=4"], f"{STEP} .*KEY=VALUE"),
    "check of mixers on a kernel": ([STEP, "--only", "paradigms_agree"], "'paradigms_agree'.*outputs_are"),
    "missing path": (["no/such/file"], "no/such/file"),
    "negative seed": (["retention", "--seed", "-1"], "seed .*>= 0.*-1"),
    "module of two widths": (
        ["torch.nn:Linear"],
        "torch.nn:Linear .*contract.*out_features.*adapt.*check-your-own-layer.md",
    ),
}

STRANGE = """
from dataclasses import replace
from typing import Literal

from pydantic import Field

from seqmix import Paradigm
from seqmix.mixers.retention import RetentionConfig


class StrangeConfig(RetentionConfig):
    kind: Literal["strange"] = "strange"


class NamelessConfig(StrangeConfig):
    name: str


class RefusedConfig(StrangeConfig):
    size: int = Field(examples=["no"])


class OneWayConfig(StrangeConfig):
    @property
    def traits(self):
        return replace(super().traits, paradigms=frozenset({Paradigm.CHUNKWISE}))


class TraitlessConfig(StrangeConfig):
    @property
    def traits(self):
        return self.nope


class BuildConfig(StrangeConfig):
    def build(self, d_model, *, layer_idx, n_layers):
        return {}["no"]
"""


@pytest.mark.parametrize("case", BAD_CHECKS)
@pytest.mark.usefixtures("forgetful")
def test_invalid_check_request_reports_one_line_error(refused, case):
    Path("strange.py").write_text(STRANGE)
    Path("leaves.py").write_text("import sys\n\nsys.exit(3)\n")
    Path("makes.py").write_text("def layer(d_model):\n    pass\n")
    Path("empty.yaml").write_text("# nothing\n")
    Path("bad.yaml").write_text("kind: retention\nn_heads: 0\n")
    Path("other.yaml").write_text("name: me\n")
    arguments, named = BAD_CHECKS[case]
    assert re.search(named, refused("check", *arguments, status=3 if case == "a folder as a file" else 2))


def test_kernel_can_be_checked_by_name(seqmix, monkeypatch):
    done = seqmix("check", STEP, "--only", "outputs_are_the_definitions", "--examples", "2")
    assert (done.status, done.err) == (0, "")
    assert re.fullmatch(r"  ✓ outputs_are_the_definitions +\d+ cases +\d+\.\d s\n", done.out)
    right = all_kernels()[STEP]
    monkeypatch.setitem(KERNELS, right.key, replace(right, function=lambda x: right.function(x._replace(q=2 * x.q))))
    done = seqmix("check", STEP, "--only", "outputs_are_the_definitions", "--examples", "2")
    assert done.status == 1
    assert re.search(r"✗ outputs_are_the_definitions.*\n +against the definition: the output differs at ", done.out)
    assert re.search(r" case = DecayCase\((dtype=[\w.]+)?\)\n", done.out)
    assert re.search(r"\n +Affected use: every call", done.out)
    assert done.out.endswith(f"{STEP} fails outputs_are_the_definitions\n")
