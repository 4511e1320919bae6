"""`training.compile`: each kind of block compiles one graph for training and one for evaluation."""

import pytest
import torch
from safetensors.torch import load_file
from small_runs import losses, run_of
from torch._dynamo.utils import counters

from seqmix import train
from seqmix.data import read_corpus
from seqmix.training.monitoring.events import Compiled, Evaluated, Stepped


@pytest.mark.slow
def test_compiled_hybrid_uses_two_graphs_per_block_kind(config_of, tmp_path, monkeypatch):
    """Nothing is recompiled later, although the last evaluation batch is short."""
    torch._dynamo.reset()
    counters.clear()
    # the compiler's front end alone: test_distributed.py trains with inductor
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, **options | {"backend": "eager"}))
    blocks = ("model.n_layers=4", "model.pattern=[ret, attn]")
    config = config_of(*blocks, "training.compile=true", preset="hybrid-tiny")
    corpus = read_corpus(config.data)
    assert len(range(0, len(corpus.validation) - 16, 16)) % config.training.batch_size, "the last batch is to be short"
    events, made = [], {}
    for event in train(config, tmp_path / "compiled"):
        events.append(event)
        if isinstance(event, Stepped | Evaluated):
            made[type(event), event.step] = counters["stats"]["unique_graphs"]
    assert made[Stepped, 1] == 2  # two kinds, four layers
    assert made[Evaluated, 2] <= 4
    assert set(made.values()) == {2, made[Evaluated, 2]}
    assert made[Stepped, 6] == made[Evaluated, 6] == made[Evaluated, 2]
    assert not counters["graph_break"]
    (compiled,) = (event for event in events if isinstance(event, Compiled))
    assert compiled.kinds == 2
    assert compiled.seconds > 0
    plain = run_of(config_of(*blocks, preset="hybrid-tiny"), tmp_path / "plain")
    assert counters["stats"]["unique_graphs"] == made[Stepped, 6]  # only where asked for
    assert losses(events) == pytest.approx(losses(plain), rel=1e-6)
    # and saved under its own names
    files = (tmp_path / run / "checkpoints" / "step-000006" / "model.safetensors" for run in ("compiled", "plain"))
    names = [load_file(file).keys() for file in files]
    assert names[0] == names[1]
    torch._dynamo.reset()
