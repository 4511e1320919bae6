"""Packing: neither state nor loss crosses document boundaries, and shapes do not depend on where they lie."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import refusal, trainer_of
from token_streams import training_batch
from torch.testing import assert_close

from seqmix import ConfigError, build_model
from seqmix.data import Batch, Stream, most_documents, pack, read_corpus
from seqmix.models import IGNORED

BEGIN = 256
LENGTH = 16


@pytest.fixture
def packed_config(config_of, tmp_path):
    """A small run on a folder of documents of 1 to 20 bytes."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for number, length in enumerate(np.random.default_rng(0).integers(1, 21, size=240).tolist()):
        text = np.random.default_rng(number).integers(97, 123, size=length).astype(np.uint8)
        (folder / f"{number:03d}").write_bytes(text.tobytes())

    def make(*overrides, **options):
        return config_of(f"data.paths=[{folder}]", "data.packing=true", *overrides, **options)

    return make


def alone(batch: Batch) -> list[Batch]:
    """The documents of a batch's sequences, each a batch of its own."""
    found = []
    for inputs, targets in zip(*batch, strict=True):
        boundaries = [0, *(at for at in range(1, len(inputs)) if inputs[at] == BEGIN), len(inputs)]
        for start, stop in pairwise(boundaries):
            found.append(Batch(inputs[None, start:stop], targets[None, start:stop]))
    return found


def loss_sum(model, inputs, targets):
    return model(inputs, targets=targets, reduction="sum").loss


def gradients(model, loss) -> dict[str, torch.Tensor]:
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.parametrize("preset", ["retnet-tiny", "attention-tiny", "linear-tiny", "hybrid-tiny"])
@pytest.mark.parametrize("order", ["random_windows", "epochs"])
def test_packed_training_matches_training_on_separate_documents(packed_config, preset, order):
    pattern = ["model.pattern=[ret, attn]"] if preset == "hybrid-tiny" else []
    config = packed_config(f"data.order={order}", *pattern, preset=preset)
    model = build_model(config.model, dtype=torch.float64)
    corpus = read_corpus(config.data)
    batch = training_batch(corpus.train, LENGTH, 6, seed=0, step=0, order=order)
    pieces = alone(batch)
    assert len(pieces) > 6 + 2
    packed = pack(batch, most_documents(corpus.train, LENGTH, BEGIN), BEGIN)
    loss = model(packed.inputs, targets=packed.targets, reduction="sum", cu_seqlens=packed.cu_seqlens).loss
    expected = sum(loss_sum(model, *piece) for piece in pieces)
    assert_close(loss, expected, rtol=1e-9, atol=0)
    assert_close(gradients(model, loss), gradients(model, expected), rtol=1e-6, atol=1e-9)
    assert abs(loss_sum(model, *batch) - expected) > 1e-4  # the documents differ enough that the test sees something


@pytest.mark.parametrize("split", ["by_file", "tail"])  # tails are much shorter documents than those of training
def test_training_step_and_evaluation_use_packing(packed_config, split):
    trainer = trainer_of(packed_config("training.grad_accum_steps=2", f"data.split={split}"))

    def mean(batches) -> float:
        pieces = [piece for batch in batches for piece in alone(batch)]
        with torch.no_grad():
            total = sum(float(loss_sum(trainer.model, *piece)) for piece in pieces)
        return total / sum(int((piece.targets != IGNORED).sum()) for piece in pieces)

    expected = mean([trainer.source.training_batch(3, 4, seed=0)])
    assert trainer.train_step(3).loss == pytest.approx(expected, rel=1e-5)
    for length in (LENGTH, 4 * LENGTH):
        expected = mean(example.batch for example in trainer.source.evaluation_batches(4, None, length))
        assert trainer.evaluate(final=True, length=length).loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("order", ["random_windows", "epochs"])
def test_training_step_uses_the_configured_order(packed_config, order):
    trainer, seen = trainer_of(packed_config(f"data.order={order}", "data.packing=false")), []
    trainer.model.embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trainer.train_step(1)
    expected = training_batch(trainer.source.corpus.train, LENGTH, 4, seed=0, step=1, order=order)
    assert torch.equal(seen[0], expected.inputs)


streams = st.lists(st.integers(1, 12), min_size=1, max_size=30).map(
    lambda lengths: np.array([token for n in lengths for token in (BEGIN, *range(n - 1))], dtype=np.uint16)
)


@given(streams, st.integers(1, 10))
def test_most_documents_bounds_the_documents_in_any_sequence(stream, length):
    starts = range(max(len(stream) - length, 0) + 1)
    most = max(1 + int((stream[start + 1 : start + length] == BEGIN).sum()) for start in starts)
    bound = most_documents(stream, length, BEGIN)
    assert most <= bound <= min(length, most + 1)
    # and of one that is mapped

    class InMemory:
        def read(self, start, stop):
            return stream[start:stop].copy()

    edges = [*np.flatnonzero(stream == BEGIN), len(stream)]
    assert most_documents(Stream([(InMemory(), np.array(list(pairwise(edges))))], BEGIN), length, BEGIN) == bound


@given(streams, st.integers(1, 10), st.integers(1, 4), st.integers(0, 100))
def test_cu_seqlens_mark_sequence_starts_and_begin_tokens(stream, length, rows, step):
    if len(stream) <= length:
        return
    batch = training_batch(stream, length, rows, seed=0, step=step)
    bound = most_documents(stream, length, BEGIN)
    packed = pack(batch, bound, BEGIN)
    assert packed.cu_seqlens.shape == (rows * bound + 1,)
    expected = {0, *range(0, rows * length, length), *np.flatnonzero(batch.inputs.flatten() == BEGIN).tolist()}
    assert sorted(set(packed.cu_seqlens.tolist())) == sorted(expected | {rows * length})
    assert packed.cu_seqlens.diff().min() >= 0
    assert torch.equal(packed.inputs, batch.inputs.view(1, -1))
    assert torch.equal(packed.targets, batch.targets.view(1, -1))


def test_pack_raises_when_documents_exceed_the_bound():
    batch = Batch(torch.tensor([[BEGIN, 1, BEGIN, 2]]), torch.tensor([[1, IGNORED, 2, 3]]))
    assert pack(batch, 2, BEGIN).cu_seqlens.tolist() == [0, 2, 4]
    with pytest.raises(RuntimeError, match="more documents"):
        pack(batch, 1, BEGIN)


def test_mixer_without_packing_support_is_refused(packed_config, monkeypatch):
    kind = type(packed_config().model.blocks["ret"].mixer)
    traits = kind.traits.fget
    monkeypatch.setattr(kind, "traits", property(lambda mixer: replace(traits(mixer), packing=False)))
    message = refusal(packed_config, ConfigError)
    assert all(part in message for part in ("data.packing", "retention", "model.blocks.ret"))
