"""The dtype of a run: how `auto` is resolved on a device, and that a resumed run reports a change."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL

from seqmix.ops.recurrence import products
from seqmix.training.precision import precision_of


@pytest.mark.parametrize(
    ("given", "able", "dtype"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("float32", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
    ],
)
def test_precision_depends_on_setting_and_bfloat16_support(config_of, monkeypatch, given, able, dtype):
    training = config_of(f"training.precision={given}").training
    monkeypatch.setattr(products, "HAS_BFLOAT16", able)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: able)
    for device in ("cpu", "cuda"):
        assert precision_of(training, torch.device(device)) is dtype


def test_run_reports_its_dtype_and_a_changed_dtype_on_resume(seqmix, monkeypatch):
    overrides = (*SMALL, "data.paths=[text.txt]", "--device", "cpu")
    monkeypatch.setattr(products, "HAS_BFLOAT16", True)
    done = seqmix("train", "retnet-tiny", *overrides, "--out", "run")
    assert done.status == 0
    assert "parameters on cpu, torch.bfloat16" in done.out
    config = Path("run/config.yaml")
    assert "precision: auto" in config.read_text()  # the file says what was asked for
    same = seqmix("train", "--resume", "run")
    assert "precision" not in same.out
    monkeypatch.setattr(products, "HAS_BFLOAT16", False)
    other = seqmix("train", "--resume", "run")
    assert "precision bfloat16 before and float32 from here on: results may differ" in other.out
    sessions = [json.loads(line)["precision"] for line in Path("run/sessions.jsonl").read_text().splitlines()]
    assert sessions == ["bfloat16", "bfloat16", "float32"]
