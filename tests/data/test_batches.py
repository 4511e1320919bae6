"""Packing: neither state nor loss crosses a border, and shapes do not depend on where the borders are."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streams import training_batch
from torch._dynamo.utils import counters
from torch.testing import assert_close

from seqmix import ConfigError, build_model, load_config, train
from seqmix.data import Batch, Stream, most_documents, pack, read_corpus
from seqmix.models import IGNORED
from seqmix.training.events import Evaluated, Stepped
from seqmix.training.trainer import Trainer

BEGIN = 256
LENGTH = 16


@pytest.fixture
def documents(tmp_path):
    """A folder of documents of 1 to 20 bytes."""
    folder = tmp_path / "documents"
    folder.mkdir()
    lengths = np.random.default_rng(0).integers(1, 21, size=240).tolist()
    for number, length in enumerate(lengths):
        text = np.random.default_rng(number).integers(97, 123, size=length).astype(np.uint8)
        (folder / f"{number:03d}").write_bytes(text.tobytes())
    return folder


@pytest.fixture
def packed_config(config_of, documents):
    def make(*overrides, **options):
        return config_of(f"data.paths=[{documents}]", "data.packing=true", *overrides, **options)

    return make


def alone(batch: Batch) -> list[Batch]:
    """The documents of a batch's sequences, each a batch of its own."""
    found = []
    for inputs, targets in zip(*batch, strict=True):
        borders = [0, *(at for at in range(1, len(inputs)) if inputs[at] == BEGIN), len(inputs)]
        for start, stop in pairwise(borders):
            found.append(Batch(inputs[None, start:stop], targets[None, start:stop]))
    return found


def loss_sum(model, inputs, targets):
    return model(inputs, targets=targets, reduction="sum").loss


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("preset", ["retnet-tiny", "attention-tiny", "linear-tiny", "hybrid-tiny"])
@pytest.mark.parametrize("order", ["random_windows", "epochs"])
def test_packed_training_is_training_on_separate_documents(packed_config, preset, order):
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
    found, wanted = gradients(model, loss), gradients(model, expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    crossing = loss_sum(model, *batch)
    assert abs(crossing - expected) > 1e-4  # the documents are not so much alike that the test sees nothing


@pytest.mark.parametrize("split", ["by_file", "tail"])  # tails are much shorter documents than what is learned
def test_a_run_s_step_and_evaluation_are_packed(packed_config, split):
    config = packed_config("training.batch_size=4", "training.grad_accum_steps=2", f"data.split={split}")
    model = build_model(config.model)
    trainer = Trainer(config, config.open_data(), model, torch.optim.SGD(model.parameters()))

    def mean(batches) -> float:
        pieces = [piece for batch in batches for piece in alone(batch)]
        with torch.no_grad():
            total = sum(float(loss_sum(model, *piece)) for piece in pieces)
        return total / sum(int((piece.targets != IGNORED).sum()) for piece in pieces)

    expected = mean([trainer.source.training_batch(3, 4, seed=0)])
    assert trainer.train_step(3)[0] == pytest.approx(expected, rel=1e-5)
    expected = mean(example.batch for example in trainer.source.evaluation_batches(4, None))
    assert trainer.evaluate(final=True).loss == pytest.approx(expected, rel=1e-5)


def test_a_run_has_the_order_that_is_asked_for(packed_config):
    seen = []
    for order in ("epochs", "random_windows"):
        config = packed_config(f"data.order={order}", "data.packing=false", "training.steps=2")
        model = build_model(config.model)
        trainer = Trainer(config, config.open_data(), model, torch.optim.SGD(model.parameters()))
        model.embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        trainer.train_step(1)
        expected = training_batch(trainer.source.corpus.train, LENGTH, 4, seed=0, step=1, order=order)
        assert torch.equal(seen.pop(), expected.inputs)


def test_a_packed_run_goes_on_as_the_unbroken_one(packed_config, tmp_path):
    config = packed_config("data.order=epochs")
    whole = [event.loss for event in train(config, tmp_path / "whole") if isinstance(event, Stepped | Evaluated)]
    events = []
    for event in train(config, tmp_path / "run", stop=lambda: events[-1].step == 3):
        events.append(event)
    events += train(config, tmp_path / "run", resume=True)
    assert [event.loss for event in events if isinstance(event, Stepped | Evaluated)] == whole


# ---- borders


streams = st.lists(st.integers(1, 12), min_size=1, max_size=30).map(
    lambda lengths: np.array([token for n in lengths for token in (BEGIN, *range(n - 1))], dtype=np.uint16)
)


@given(streams, st.integers(1, 10))
def test_the_bound_is_the_most_documents_of_any_sequence(stream, length):
    counts = []
    for start in range(max(len(stream) - length, 0) + 1):
        window = stream[start : start + length]
        counts.append(1 + int((window[1:] == BEGIN).sum()))
    bound = most_documents(stream, length, BEGIN)
    assert max(counts) <= bound <= min(length, max(counts) + 1)


@given(streams, st.integers(1, 10), st.integers(1, 4), st.integers(0, 100))
def test_borders_are_the_sequences_and_the_begin_tokens(stream, length, rows, step):
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


def test_more_documents_than_the_bound_are_never_left_out():
    batch = Batch(torch.tensor([[BEGIN, 1, BEGIN, 2]]), torch.tensor([[1, IGNORED, 2, 3]]))
    assert pack(batch, 2, BEGIN).cu_seqlens.tolist() == [0, 2, 4]
    with pytest.raises(RuntimeError, match="a sequence has more documents than its stream"):
        pack(batch, 1, BEGIN)


def test_a_mapped_stream_has_the_same_bound():
    tokens = np.array([BEGIN, 1, 2, BEGIN, 3, BEGIN, BEGIN, 4, 5, 6], dtype=np.uint16)

    class Held:
        ends = np.array([3, 5, 6, 10])
        digests = np.zeros(4, dtype=np.uint64)

        def read(self, start, stop):
            return tokens[start:stop].copy()

    stream = Stream([(Held(), np.array([[0, 3], [3, 5], [5, 6], [6, 10]]))], BEGIN)
    for length in range(1, 11):
        assert most_documents(stream, length, BEGIN) == most_documents(tokens, length, BEGIN)


@pytest.mark.slow
def test_packed_shapes_are_compiled_once(packed_config, tmp_path, monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(function, backend="eager", **options))
    pattern = ("model.pattern=[ret, attn]", "model.blocks.ret.ffn=null", "model.blocks.attn.ffn=null")
    config = packed_config("training.compile=true", *pattern, preset="hybrid-tiny")
    graphs = [
        counters["stats"]["unique_graphs"]
        for event in train(config, tmp_path / "run")
        if isinstance(event, Stepped | Evaluated)
    ]
    assert graphs[0] == 2  # a kind each
    assert graphs[-1] == graphs[2] <= 4
    torch._dynamo.reset()


# ---- what cannot be packed

UNPACKED = """
from typing import Any, Literal
from pydantic import Field
from seqmix import MixerConfig, Paradigm, Traits


class AloneConfig(MixerConfig):
    kind: Literal["alone"] = "alone"
    paradigm: Paradigm = Field(default=Paradigm.PARALLEL, strict=False)

    @property
    def traits(self):
        return Traits(paradigms=frozenset({Paradigm.PARALLEL}), state="constant", packing=False, shift_invariant=True)

    def build(self, d_model, *, layer_idx, n_layers):
        raise NotImplementedError
"""


def test_a_mixer_that_does_not_declare_packing_is_refused(tmp_path, monkeypatch):
    (tmp_path / "unpacked_mixer.py").write_text(UNPACKED)
    monkeypatch.syspath_prepend(tmp_path)
    block = "model.blocks.ret={mixer: {kind: unpacked_mixer:AloneConfig}, ffn: null, norm: {kind: layernorm}}"
    load_config("retnet-tiny", [block])
    with pytest.raises(ConfigError) as raised:
        load_config("retnet-tiny", [block, "data.packing=true"])
    assert "\n" not in str(raised.value)
    assert "alone of model.blocks.ret does not: set data.packing to false" in str(raised.value)
