"""`training.compile`: a graph each for training and evaluation by kind of block, made once."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from seqmix import train
from seqmix.data import read_corpus
from seqmix.training.events import Compiled, Evaluated, Stepped

# without feed-forward networks, which the compiler knows by heart: each of its kernels takes a second to build
HYBRID = (
    "model.pattern=[ret, attn]",
    "model.n_layers=4",
    "model.blocks.ret.ffn=null",
    "model.blocks.attn.ffn=null",
)


@pytest.fixture(autouse=True)
def _no_graphs_are_left():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_a_compiled_hybrid_trains_with_two_graphs_by_kind_and_never_more(config_of, tmp_path):
    """The last batch of the evaluation is short, and steps and evaluations go on: nothing is compiled anew."""
    config = config_of(*HYBRID, "training.compile=true", preset="hybrid-tiny")
    corpus = read_corpus(config.data)
    assert len(range(0, len(corpus.validation) - 16, 16)) % config.training.batch_size, "the last batch is to be short"
    events, made = [], {}
    for event in train(config, tmp_path / "compiled"):
        events.append(event)
        if isinstance(event, Stepped | Evaluated):
            made[type(event), event.step] = graphs()
    assert made[Stepped, 1] == 2  # two kinds, four layers
    assert made[Evaluated, 2] <= 4
    assert set(made.values()) == {2, made[Evaluated, 2]}
    assert made[Stepped, 6] == made[Evaluated, 6] == made[Evaluated, 2]
    assert not counters["graph_break"]
    (compiled,) = (event for event in events if isinstance(event, Compiled))
    assert compiled.kinds == 2
    assert compiled.seconds > 0

    plain = list(train(config_of(*HYBRID, preset="hybrid-tiny"), tmp_path / "plain"))
    for kind in (Stepped, Evaluated):
        losses, expected = ([e.loss for e in run if isinstance(e, kind)] for run in (events, plain))
        assert losses == pytest.approx(expected, rel=1e-4)
    assert all(math.isfinite(event.loss) for event in events if isinstance(event, Stepped))


def test_only_blocks_are_compiled_and_only_where_asked_for(config_of, tmp_path, monkeypatch):
    calls = []

    def compiled(function, **options):
        calls.append((type(function.__self__).__name__, function.__name__, options))
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    list(train(config_of("training.steps=2"), tmp_path / "plain"))
    assert calls == []
    list(train(config_of("training.steps=2", "training.compile=true"), tmp_path / "compiled"))
    assert calls == [("Block", "forward_ret", {"fullgraph": True})] * 2


def test_a_compiled_model_is_saved_under_its_own_names(config_of, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    list(train(config_of("training.compile=true", "training.steps=2"), tmp_path / "compiled"))
    list(train(config_of("training.steps=2"), tmp_path / "plain"))
    first, second = (
        load_file(tmp_path / name / "checkpoints" / "step-000002" / "model.safetensors")
        for name in ("compiled", "plain")
    )
    assert first.keys() == second.keys()
