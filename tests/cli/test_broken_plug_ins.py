"""Errors in a plug-in's code: every command reports in one line where they are and what was expected."""

import json
import re
from pathlib import Path

import pytest

from seqmix import SequenceMixer
from seqmix.registry import ConfigError

PLUG_IN = """
from typing import Literal

from torch import nn

from seqmix import Paradigm
from seqmix.mixers.parts import QKVConfig, QKVMixer
from seqmix.ops.decay import decay


class MineConfig(QKVConfig):
    kind: Literal["mine"] = "mine"
    n_heads: int = 2
    paradigm: Paradigm = Paradigm.CHUNKWISE

    {build}


class Mine(QKVMixer):
    {method}
"""
BUILD = "def build(self, d_model, *, layer_idx, n_layers): "
RECUR = "def recur(self, x, h, call): "
OUTPUT = "decay(h.q, h.k, h.v, None, call)"
BUILDS, RECURS = f"{BUILD}return Mine(self, d_model)", f"{RECUR}return {OUTPUT}"

BROKEN = {
    "build without keywords": (
        "def build(self, d_model): return Mine(self, d_model)",
        RECURS,
        r"MineConfig\.build .*{file}:16\) must take \(self, d_model, \*, layer_idx, n_layers\), got \(self, d_model\)",
    ),
    "build without a result": (
        f"{BUILD}Mine(self, d_model)",
        RECURS,
        r"mine: build must return a SequenceMixer, got None.*MineConfig\.build .*{file}:16",
    ),
    "build of another module": (
        f"{BUILD}return nn.Sequential(nn.ReLU(), nn.ReLU())",
        RECURS,
        r"mine: build must return a SequenceMixer, got a Sequential.*MineConfig\.build .*{file}:16",
    ),
    "build that raises": (
        f"{BUILD}return {{}}['no']",
        RECURS,
        r"(mine: .*|broken.*:Mine(Config)?) raised KeyError: 'no' .*{file}:16, in build",
    ),
    "mixer without super().__init__": (
        BUILDS,
        f"{RECURS}\n    def __init__(self, config, d_model): nn.Module.__init__(self)",
        r"Mine\.__init__ .*{file}:21\) has to call super\(\).__init__\(config\)",
    ),
    "recur without call": (
        BUILDS,
        "def recur(self, x, h): return x",
        r"Mine\.recur .*{file}:20\) must take \(self, x, h, call\), got \(self, x, h\)",
    ),
    "recur of a tensor": (
        BUILDS,
        f"{RECUR}return {OUTPUT}[0]",
        r"mine: recur must return \(output, state\), got a Tensor.*Mine\.recur .*{file}:20",
    ),
    "recur of three": (
        BUILDS,
        f"{RECUR}return (*{OUTPUT}, None)",
        r"mine: recur must return \(output, state\), got a tuple of 3.*Mine\.recur .*{file}:20",
    ),
    "recur that raises": (
        BUILDS,
        f"{RECUR}return x.reshape(7, 11)",
        r"(mine: .*|broken.*:Mine(Config)?) raised RuntimeError: shape '\[7, 11\]' .*{file}:20, in recur",
    ),
    "mix without call": (
        BUILDS,
        f"{RECURS}\n    def mix(self, x): return x, None",
        r"Mine\.mix .*{file}:21\) must take \(self, x, call\), got \(self, x\)",
    ),
    "mix of a tensor": (
        BUILDS,
        f"{RECURS}\n    def mix(self, x, call): return super().mix(x, call)[0]",
        r"mine: mix must return \(output, state\) or a MixResult, got a Tensor.*Mine\.mix .*{file}:21",
    ),
}
"""By what is wrong: a plug-in's `build` (line 16), its methods (from line 20), and the parts of the error."""


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Writes a broken plug-in; returns the path of its configuration and the parts of its error."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(case: str) -> tuple[str, str]:
        build, method, words = BROKEN[case]
        module = f"broken{list(BROKEN).index(case)}"  # Python imports a module once
        Path(f"{module}.py").write_text(PLUG_IN.format(build=build, method=method))
        return f"{module}:MineConfig", words.format(file=f"{module}.py")

    return write


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("command", ["show", "check"])
def test_broken_plug_in_reports_one_line_error_and_json_location(seqmix, broken, command, case):
    path, words = broken(case)
    arguments = [path] if command == "check" else ["retnet-tiny", *model_of(path)]
    done = seqmix(command, *arguments, "--json", "-")
    (line,) = done.err.splitlines()
    assert re.search(f"^error: .*{words}", line)
    result = json.loads(done.out)
    assert line == f"error: {result['error']}"
    assert (done.status, result["exit_status"]) == (2, 2)


@pytest.mark.parametrize("case", ["build without keywords", "recur of a tensor", "recur that raises"])
def test_training_a_broken_plug_in_reports_one_line_error(seqmix, broken, case):
    path, words = broken(case)
    Path("text.txt").write_text("a text to train on. " * 100)
    small = ["data.paths=[text.txt]", "data.sequence_length=16", "training.steps=1"]
    done = seqmix("train", "retnet-tiny", *model_of(path), *small, "--out", "run")
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert re.search(f"^error: .*{words}", line)


def test_benchmark_of_an_unbuildable_plug_in_reports_one_line_error(refused, broken):
    path, words = broken("build without keywords")
    assert re.search(words, refused("bench", "train", "retnet-tiny", *model_of(path), "--length", "16"))


def model_of(path: str) -> list[str]:
    return [f"model.blocks.ret.mixer={{kind: {path}}}", "model.d_model=16", "model.n_layers=1"]


def test_class_statement_raises_if_method_parameters_are_wrong():
    with pytest.raises(ConfigError, match=r"Short\.init_state .* \(self, batch_size, \*, max_length=None\), got"):

        class Short(SequenceMixer):
            def init_state(self, batch_size):
                return ()


def test_methods_may_rename_and_add_parameters():
    class Other(SequenceMixer):
        def mix(self, inputs, call, scale=1.0):
            return inputs * scale, None

        def init_state(self, *arguments, **options):
            return ()

    assert issubclass(Other, SequenceMixer)
