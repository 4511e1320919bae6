"""A run at other lengths: the loss of the same text, position by position, is what its logits say."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from seqmix import Paradigm, SeqmixError, build_model, train
from seqmix.models import IGNORED
from seqmix.training.length_eval import by_context, by_length, common_paradigms, open_text


@pytest.fixture
def opened(config_of):
    """A model that has learned nothing, in float64, and its text, for lengths of 16 to 64."""

    def make(*overrides, preset="hybrid-tiny"):
        config = config_of("model.n_layers=4", *overrides, preset=preset)
        model = build_model(config.model, dtype=torch.float64).eval()
        return model, open_text(config, None, (16, 24, 32, 64))

    return make


def losses_of(model, batch):
    """The loss of each token, from the logits."""
    logits = model(batch.inputs).logits
    return F.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=IGNORED, reduction="none")


def test_the_losses_are_those_of_the_logits_by_position(opened):
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


def test_a_paradigm_that_computes_something_else_is_seen(opened):
    model, text = opened("model.pattern=[ret]")
    mix = type(model.blocks[0].mixer).mix

    def wrong(self, x, call):
        y, after = mix(self, x, call)
        return (y * 1.01 if call.paradigm is Paradigm.RECURRENT else y), after

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.blocks[0].mixer), "mix", wrong)
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


def test_a_context_is_the_end_of_the_same_sequences(opened):
    model, text = opened()
    found = list(by_context(model, text, [16, 64], scored=8, tokens=128))
    (example,) = text.evaluation_batches(64, 1, 64)
    asked = (example.batch.targets[:, -8:] != IGNORED).sum()
    for context in found:
        tokens = type(example.batch)(*(part[:, -context.context :] for part in example.batch))
        expected = losses_of(model, tokens)[:, -8:].sum() / asked
        assert context.tokens == asked
        assert_close(context.loss, expected.item(), rtol=1e-6, atol=0)
    with pytest.raises(SeqmixError, match=r"^the last 20 tokens of a context are scored, and one has 16$"):
        list(by_context(model, text, [16, 64], scored=20, tokens=128))


def test_packed_documents_start_from_nothing(opened):
    packed, plain = (opened(f"data.packing={on}", "data.split=tail") for on in ("true", "false"))
    (found, other) = (
        next(by_length(*pair, [32], paradigms=lambda _: [Paradigm.CHUNKWISE, Paradigm.RECURRENT], tokens=64))
        for pair in (packed, plain)
    )
    assert found.tokens == other.tokens
    assert found.difference < 1e-9


def test_paradigms_are_those_that_all_layers_declare(opened):
    model, _ = opened()
    assert set(common_paradigms(model)) == set(Paradigm)
    model, _ = opened(preset="hyena-tiny")
    assert common_paradigms(model) == (Paradigm.PARALLEL, Paradigm.RECURRENT)


# ---- the command


@pytest.fixture
def run(config_of, tmp_path):
    list(train(config_of(), tmp_path / "run"))
    return str(tmp_path / "run")


def test_a_run_is_evaluated(seqmix, run):
    done = seqmix("evaluate", run, "--tokens", "256", "--json", "found.json", "--context", "16", "--length", "64")
    assert (done.status, done.err) == (0, "")
    assert "By chunkwise, parallel and recurrent, no token's loss differs by more than" in done.out
    found = json.loads(Path("found.json").read_text())
    assert (found["trained_length"], found["scored"]) == (16, 4)
    assert [at["length"] for at in found["lengths"]] == [64]
    assert set(found["lengths"][0]["losses"]) == {"parallel", "recurrent", "chunkwise"}
    assert found["contexts"][0]["context"] == 16


def test_a_length_is_told_as_a_share_of_that_of_training(seqmix, run):
    done = seqmix("evaluate", run, "--tokens", "64", "--paradigm", "chunkwise", "--length", "3")
    assert " 0.188 x" in done.out


def test_by_default_it_is_as_long_as_the_text_allows(seqmix, run):
    done = seqmix("evaluate", run, "--tokens", "64", "--paradigm", "chunkwise")
    assert done.status == 0
    assert " 16 x" in done.out
    assert "recurrent" not in done.out
    Path("text.txt").write_text("a text " * 10)
    short = seqmix(
        "train",
        "retnet-tiny",
        "model.d_model=16",
        "data={paths: [text.txt], split: tail, sequence_length: 2}",
        "training={steps: 1, batch_size: 1, warmup_steps: 0}",
        "--out",
        "short",
    )
    assert short.status == 0
    done = seqmix("evaluate", "short", "--tokens", "8")
    assert "note: text.txt has 8 validation tokens: nothing is measured at 8, 16 and 32" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--length", "999999"],
            "a sequence of 999,999 tokens and its last target need 1,000,000 tokens of validation text",
        ),
        (["--paradigm", "recurent"], "no paradigm 'recurent' is declared by all layers; by all: chunkwise, parallel"),
        (["--context", "16", "--scored", "17"], "the last 17 tokens of a context are scored, and one has 16"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used here: "),
        (["--json", "no/x.json"], "no/x.json cannot be written: there is no folder "),
        (["--checkpoint", "99"], "no checkpoint of"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(seqmix, run, arguments, message):
    done = seqmix("evaluate", run, *arguments)
    assert done.status == 2
    assert done.err.startswith(f"error: {message}")
    assert done.err.count("\n") == 1
