"""The bench command writes its measurements and rejects bad input before it measures anything."""

import json
import os

import pytest
import torch

from seqmix.lab.bench import machine
from seqmix.lab.bench.machine import Rates
from seqmix.lab.bench.models import model_to_measure

SMALL = ("retnet-tiny", "model.d_model=32", "model.n_layers=1", "model.blocks.ret.mixer={n_heads: 2, chunk_size: 16}")


@pytest.fixture
def bench(seqmix, monkeypatch):
    monkeypatch.setattr(machine.Rates, "for_device", lambda device: Rates(32, 2**12))
    return lambda *arguments: seqmix("bench", *arguments)


@pytest.fixture
def refused_at_once(refused, monkeypatch):
    def measured(*arguments):
        raise AssertionError("something was measured")

    monkeypatch.setattr("seqmix.lab.bench.benchmark.time_interleaved", measured)
    return lambda *arguments, status=2: refused("bench", *arguments, status=status)


@pytest.mark.parametrize("what", ["op", "train", "decode", "prefill"])
def test_benchmark_runs_and_writes_json_and_markdown(what, bench, tmp_path):
    done = bench(what, *SMALL, "--length", "32", "--tokens", "64", "--json", "out.json", "--markdown", "out.md")
    assert done.status == 0, done.err
    assert "interleaved" in done.out
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["benchmark"] == what
    first = report["rows"][0]
    assert first["skipped"] is None
    assert first["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    # nobody fails by surprise
    assert not [row["skipped"] for row in report["rows"] if "failed" in (row["skipped"] or "")]
    assert "| T | implementation |" in (tmp_path / "out.md").read_text().replace("| what ", "")


def test_mixers_are_compared_with_retention_and_with_their_reference(bench, tmp_path):
    only = [argument for name in ("retention", "min_gru", "min_gru-reference") for argument in ("--only", name)]
    done = bench("mixers", "--length", "16", "--tokens", "16", *only, "--json", "out.json")
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["retention", "min_gru", "min_gru-reference"]
    assert rows[0]["ratio"]["median"] == 1.0
    assert rows[1]["parameters"] == rows[2]["parameters"]


def test_mixers_are_named_by_kind_and_plugins_can_be_measured(bench, tmp_path, monkeypatch):
    (tmp_path / "own_mixer.py").write_text(
        "from typing import Literal\nfrom seqmix.mixers.retention import RetentionConfig\n"
        "class OwnConfig(RetentionConfig):\n    kind: Literal['own_mixer:OwnConfig'] = 'own_mixer:OwnConfig'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    only = "--only", "linear", "--only", "own_mixer:OwnConfig"
    done = bench("mixers", "--length", "16", "--tokens", "16", *only, "--json", "out.json")
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["linear_attention", "own_mixer:OwnConfig"]
    assert "--only linear is deprecated, use linear_attention" in done.err


def test_models_are_measured_without_dropout():
    model = model_to_measure("retnet-200m", [])
    assert model.dropout == 0
    assert {block.dropout for block in model.blocks.values()} == {0}
    assert model_to_measure(None, []).d_model == 512


def test_compile_option_adds_compiled_variants(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    monkeypatch.setattr("seqmix.lab.bench.peers.ours.compile_blocks", lambda model: 1)
    options = "--length", "32", "--tokens", "32", "--compile", "--activation-checkpointing", "--json", "out.json"
    bench("train", *SMALL, *options)
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert rows["seqmix-compiled"]["share"] is not None
    assert {"seqmix", "by-hand", "by-hand-compiled", "gpt-sdpa", "gpt-sdpa-compiled"} <= set(rows)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("trian",), 'did you mean "train"'),
        (("op", *SMALL, "--only", "chunkwize"), 'did you mean "chunkwise"'),
        (("train", *SMALL, "--only", "seqmix-compiled"), "there is no implementation 'seqmix-compiled'"),
        (("op", *SMALL, "--length", "0"), "expected --length from 1 to 16,777,216, got 0"),
        (("op", *SMALL, "--repeat", "4"), "expected --repeat from 5 to 10,000, got 4"),
        (("op", *SMALL, "--batch", "0"), "expected --batch from 1 to 1,048,576, got 0"),
        (("train", *SMALL, "--tokens", "-1"), "expected --tokens from 1 to 16,777,216, got -1"),
        (
            ("op", *SMALL, "--limit", "nan"),
            "expected a duration such as 90s, 30m or 1h30m, or a number of seconds, got 'nan'",
        ),
        (("op", *SMALL, "--dtype", "float23"), 'did you mean "float32"? Dtypes: float32, bfloat16'),
        (("op", *SMALL, "--device", "gpu"), "device 'gpu' cannot be used here: "),
        (("op", "attention-tiny"), "bench op needs a model with retention, got one with attention"),
        (("op", *SMALL, "--json", "no/such/out.json"), "no/such/out.json cannot be written: there is no folder "),
        (("op", *SMALL, "--markdown", "."), ". cannot be written: it is a folder"),
        (("op", *SMALL, "--plot", "plot.docx"), "--plot plot.docx: the name must end in one of ."),
    ],
)
def test_bad_input_is_rejected_before_measuring(arguments, sentence, refused_at_once):
    assert sentence in refused_at_once(*arguments, status=3 if "cannot be written" in sentence else 2)


def test_unwritable_output_file_is_rejected_at_once(refused_at_once, monkeypatch):
    # whoever runs the tests may be allowed everything
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert refused_at_once("op", *SMALL, "--json", "a.json", status=3) == "a.json cannot be written: permission denied"
