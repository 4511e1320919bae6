"""Evaluation of a run at other lengths: losses by position match the logits on the same text."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_runs import run_of
from torch.testing import assert_close

from seqmix import Paradigm, build_model
from seqmix.models import IGNORED
from seqmix.training.config import TrainingConfig
from seqmix.training.length_eval import as_in_training, by_context, by_length, common_paradigms, open_text
from seqmix.training.monitoring.measurements import read_measurements


@pytest.fixture
def opened(config_of):
    """An untrained model in float64, and its text, for lengths of 16 to 64."""

    def make(*overrides, preset="hybrid-tiny"):
        config = config_of("model.n_layers=4", *overrides, preset=preset)
        model = build_model(config.model, dtype=torch.float64).eval()
        return model, open_text(config, None, (16, 24, 32, 64))

    return make


def losses_of(model, batch):
    """The loss of each token, from the logits."""
    logits = model(batch.inputs).logits
    return F.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=IGNORED, reduction="none")


def test_losses_by_position_match_the_logits(opened):
    model, text = opened()
    (found,) = by_length(model, text, [64], paradigms=lambda _: list(Paradigm), tokens=128)
    (example,) = text.evaluation_batches(64, 1, 64)
    losses, asked = losses_of(model, example.batch), example.batch.targets != IGNORED
    assert [(place.start, place.stop) for place in found.positions] == [(0, 4), (4, 8), (8, 16), (16, 32), (32, 64)]
    for place in found.positions:
        here = slice(place.start, place.stop)
        assert place.tokens == asked[:, here].sum()
        expected = (losses[:, here].sum() / place.tokens).item()
        assert_close(torch.tensor(list(place.losses.values())), torch.full((3,), expected), rtol=1e-6, atol=0)
    assert found.tokens == asked.sum()
    assert_close(found.losses[Paradigm.RECURRENT], (losses.sum() / asked.sum()).item(), rtol=1e-6, atol=0)
    assert 0 < found.difference < 1e-9
    assert set(common_paradigms(model)) == set(Paradigm)
    assert common_paradigms(opened(preset="hyena-tiny")[0]) == (Paradigm.PARALLEL, Paradigm.RECURRENT)


def test_paradigm_with_a_different_loss_is_detected(opened, monkeypatch):
    model, text = opened("model.pattern=[ret]")
    kind = type(model.blocks[0].mixer)
    mix = kind.mix

    def wrong(self, x, call):
        y, after = mix(self, x, call)
        return (y * 1.01 if call.paradigm is Paradigm.RECURRENT else y), after

    monkeypatch.setattr(kind, "mix", wrong)
    (found,) = by_length(model, text, [32], paradigms=lambda _: list(Paradigm), tokens=64)
    assert found.difference > 1e-4


def test_all_lengths_read_the_same_text(opened):
    model, text = opened()
    seen = {}
    model.register_forward_pre_hook(
        lambda module, args: seen.setdefault(args[0].shape[1], []).append(args[0].flatten())
    )
    list(by_length(model, text, [16, 24, 64], paradigms=lambda _: [Paradigm.CHUNKWISE], tokens=128))
    texts = {length: torch.cat(parts) for length, parts in seen.items()}
    assert torch.equal(texts[16], texts[64])
    assert torch.equal(texts[24].view(-1, 48), texts[64].view(-1, 64)[:, :48])


def test_shorter_contexts_score_the_end_of_the_same_sequences(opened):
    model, text = opened()
    (example,) = text.evaluation_batches(64, 1, 64)
    asked = (example.batch.targets[:, -8:] != IGNORED).sum()
    for context in by_context(model, text, [16, 64], scored=8, tokens=128):
        tokens = type(example.batch)(*(part[:, -context.context :] for part in example.batch))
        assert context.tokens == asked
        assert_close(context.loss, (losses_of(model, tokens)[:, -8:].sum() / asked).item(), rtol=1e-6, atol=0)


def test_packed_documents_start_from_an_empty_state(opened):
    both, fields = lambda _: [Paradigm.CHUNKWISE, Paradigm.RECURRENT], ("data.packing=true", "data.packing=false")
    pairs = (opened(field, "data.split=tail") for field in fields)
    found, other = (next(by_length(*pair, [32], paradigms=both, tokens=64)) for pair in pairs)
    assert found.tokens == other.tokens
    assert found.difference < 1e-9


@pytest.fixture
def evaluate(seqmix, config_of, tmp_path):
    """The command on a run, or on another one."""
    run_of(config_of("training.steps=2"), tmp_path / "run")
    return lambda *arguments, run="run": seqmix("evaluate", run, *arguments)


def test_evaluate_command_reports_lengths_contexts_and_paradigms(evaluate):
    done = evaluate("--tokens", "256", "--json", "found.json", "--context", "16", "--length", "64")
    assert (done.status, done.err) == (0, "")
    assert all(paradigm in done.out for paradigm in Paradigm)
    found = json.loads(Path("found.json").read_text())["runs"]["run"]
    assert (found["trained_length"], found["scored"]) == (16, 4)
    assert [at["length"] for at in found["lengths"]] == [64]
    assert set(found["lengths"][0]["losses"]) == set(Paradigm)
    assert found["contexts"][0]["context"] == 16
    assert " 0.188 x" in evaluate("--tokens", "64", "--paradigm", "chunkwise", "--length", "3").out


def test_default_evaluation_reproduces_the_final_validation_loss_of_training(evaluate):
    done = evaluate("--tokens", "64", "--paradigm", "chunkwise", "--json", "found.json")
    (final,) = (line for line in read_measurements(Path("run")) if line.get("final"))
    measured = json.loads(Path("found.json").read_text())["runs"]["run"]["final"]
    assert measured["loss"] == pytest.approx(final["validation_loss"], rel=1e-6)
    assert measured["tokens"] == final["validation_tokens"]
    shown = f"{measured['loss']:.4f} ± {measured['error']:.4f} nats/token over {measured['tokens']:,} tokens"
    assert shown in done.out
    beside = evaluate("run", "--tokens", "64", "--paradigm", "chunkwise").out
    assert f"{measured['loss']:.4f} ± {measured['error']:.4f}" in beside
    assert "training's final evaluation" not in evaluate("--tokens", "64", "--length", "16").out


def test_loss_error_is_the_standard_error_over_sequences(opened):
    model, text = opened()
    training = TrainingConfig(learning_rate=1e-3, steps=1, batch_size=3, final_evaluation_batches=2)
    measured = as_in_training(model, text, training)
    means = torch.cat([losses_of(model, example.batch).mean(1) for example in text.evaluation_batches(3, 2)])
    assert (measured.loss, measured.error) == pytest.approx((means.mean().item(), means.std().item() / 6**0.5))
    chunkwise = {"paradigms": lambda _: [Paradigm.CHUNKWISE], "tokens": 4096}
    short, long = (each.error for each in by_length(model, text, (16, 64), **chunkwise))
    assert short == pytest.approx(long, rel=0.5)  # both over stretches of 64 tokens
    (only_one,) = by_length(model, text, (len(text.corpus.validation) - 1,), **chunkwise)
    assert only_one.error is None


def test_default_lengths_are_limited_by_the_text(evaluate, seqmix):
    done = evaluate("--tokens", "64", "--paradigm", "chunkwise")
    assert done.status == 0
    assert " 16 x" in done.out
    assert "recurrent" not in done.out
    Path("text.txt").write_text("a text " * 10)
    data = "data={paths: [text.txt], split: tail, sequence_length: 2}"
    training = "training={steps: 1, batch_size: 1, warmup_steps: 0}"
    assert seqmix("train", "retnet-tiny", "model.d_model=16", data, training, "--out", "short").status == 0
    done = evaluate("--tokens", "8", run="short")
    assert re.search("note: text.txt .* 8, 16 and 32", done.err)


def test_invalid_evaluate_arguments_report_one_line(evaluate):
    for arguments, named, status in (
        (["--length", "999999"], "999,999 .*1,000,000", 2),
        (["--paradigm", "recurent"], "'recurent'.*chunkwise, parallel", 2),
        (["--context", "16", "--scored", "17"], r" 16\b.* 17\b", 2),
        (["--json", "no/x.json"], "no/x.json", 3),
    ):
        done = evaluate(*arguments)
        assert done.status == status
        assert re.search(f"^error: .*{named}", done.err)
        assert done.err.count("\n") == 1
