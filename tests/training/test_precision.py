"""The dtype of a run: what a trial chooses, and that it stays."""

import json
from itertools import accumulate, chain, cycle
from pathlib import Path

import pytest
import torch
from conftest import SMALL

from seqmix import load_config
from seqmix.ops.recurrence import products
from seqmix.training import precision


def clock_of(bfloat16, float32):
    """A clock by which every step takes this long, and nothing else any time."""
    return accumulate(chain([0.0], cycle([bfloat16, 0.0, float32, 0.0]))).__next__


@pytest.fixture
def able(monkeypatch):
    """A CPU that multiplies bfloat16, and no step too small for a trial."""
    monkeypatch.setattr(products, "HAS_BFLOAT16", True)
    monkeypatch.setattr(precision, "MIN_STEP_FLOPS", 0)


@pytest.mark.parametrize(("bfloat16", "chosen"), [(1.0, True), (1.8, True), (2.0, False), (3.0, False)])
def test_a_trial_chooses_what_is_faster(able, config_of, bfloat16, chosen):
    config, before = config_of("model.blocks.ret.dropout=0.1"), torch.get_rng_state()
    found, said = precision.choose_precision(config, clock_of(bfloat16, 2.0))
    assert torch.equal(torch.get_rng_state(), before)
    assert found.training.precision == ("bfloat16" if chosen else "auto")
    assert found.model == config.model
    assert (said is None) != chosen
    if said is not None:
        assert said == (
            f"using bfloat16 matrix products, which took {bfloat16 / 2:.2f} of float32's time in a trial; disable with "
            "training.precision=float32"
        )


@pytest.mark.parametrize("given", ["auto", "float32", "bfloat16"])
def test_there_is_no_trial_of_what_is_given_or_small_or_where_it_cannot_be_faster(able, config_of, monkeypatch, given):
    def unused():
        raise AssertionError

    config = config_of(f"training.precision={given}")
    if given == "auto":
        monkeypatch.setattr(precision, "MIN_STEP_FLOPS", 2**30)
    assert precision.choose_precision(config, unused) == (config, None)
    monkeypatch.setattr(products, "HAS_BFLOAT16", False)
    assert precision.choose_precision(load_config("retnet-tiny"), unused)[1] is None


def test_a_resumed_run_keeps_the_dtype_that_a_trial_chose(able, seqmix, monkeypatch):
    monkeypatch.setattr(precision, "_ratio", lambda *_: 0.5)
    overrides = (*SMALL, "data.paths=[text.txt]", "--device", "cpu")
    done = seqmix("train", "retnet-tiny", *overrides, "--out", "whole")
    assert done.status == 0
    assert "note: using bfloat16 matrix products, which took 0.50 of float32's time" in done.err
    monkeypatch.setattr(precision, "_ratio", lambda *_: 2.0)
    assert "precision: bfloat16" in Path("whole/config.yaml").read_text()
    assert seqmix("train", "--resume", "whole").status == 0
    sessions = [json.loads(line)["precision"] for line in Path("whole/sessions.jsonl").read_text().splitlines()]
    assert sessions == ["bfloat16"] * 2
    assert "bfloat16" not in seqmix("train", "retnet-tiny", *overrides, "--out", "other").err
