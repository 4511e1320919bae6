"""Compiled blocks: one graph per mixer kind and use, independent between models."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.testing import assert_close

from seqmix import Paradigm
from seqmix.models import compile_blocks
from seqmix.models.compiling import rows_as_sums

KINDS = (
    "retention",
    "retention of the plain kind",
    "learnable retention",
    "attention",
    "windowed attention",
    "xpos attention",
    "attention without positions",
    "linear_attention",
    "linear attention without denominator",
)
"""Nine: eight is what the compiler allows one piece of code."""

pytestmark = pytest.mark.usefixtures("plainly_compiled")


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def run(model, batch_size=2, length=8):
    """Training, evaluation, and steps from a state: everything a run does, and varying data."""
    results = []
    for seed in range(2):
        tokens = torch.randint(0, 257, (batch_size, length), generator=torch.Generator().manual_seed(seed))
        model.train()
        loss = model(tokens, targets=tokens, reduction="sum").loss
        loss.backward()
        results.append(loss.detach())
        model.eval()
        with torch.no_grad():
            results.append(model(tokens).logits)
            state = model.init_state(batch_size, max_length=4)
            for step in range(3):
                logits, _, state, *_ = model(
                    tokens[:, step : step + 1], state, paradigm=model.prefer(Paradigm.RECURRENT), return_state=True
                )
                results.append(logits)
    return results


@pytest.mark.slow
def test_nine_mixer_kinds_compile_three_graphs_each(model_of):
    model = model_of(*KINDS)
    expected = run(model)
    assert compile_blocks(model) == 9
    assert_close(run(model), expected)
    assert graphs() == 3 * 9
    run(model)
    assert graphs() == 3 * 9
    assert not counters["graph_break"]


@pytest.mark.slow
def test_second_model_does_not_recompile_the_first(model_of):
    first, second = model_of("retention"), model_of("retention")
    for model in (first, second):
        compile_blocks(model)
        run(model)
    made = graphs()
    run(first)
    run(second)
    assert graphs() == made == 6


def test_compiling_keeps_parameter_names_and_hooks(model_of):
    model = model_of("retention", "attention")
    names, calls = list(model.state_dict()), []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    compile_blocks(model)
    assert list(model.state_dict()) == names
    model(torch.zeros(1, 4, dtype=torch.long))
    assert calls == [1]


def test_copy_of_compiled_model_uses_its_own_parameters(model_of):
    """Copied compiled code would still use the original model's blocks."""
    model = model_of("retention")
    compile_blocks(model)
    copy = deepcopy(model)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    assert_close(copy(tokens).logits, model(tokens).logits)
    with torch.no_grad():
        copy.blocks[0].mixer.out_proj.weight.zero_()
    assert not torch.equal(copy(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("bias", [False, True])
def test_one_row_products_become_sums_before_inductor(monkeypatch, bias):
    given = []

    def inductor(graph, inputs):
        given.append(graph)
        return graph.forward

    lookup = torch._dynamo.lookup_backend
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda x: inductor if x == "inductor" else lookup(x))
    layers = torch.nn.Sequential(torch.nn.Linear(5, 7, bias=bias), torch.nn.SiLU(), torch.nn.Linear(7, 3, bias=bias))
    compiled = torch._dynamo.optimize(rows_as_sums)(layers)
    row, rows = torch.randn(1, 1, 5), torch.randn(2, 1, 5)
    with torch.no_grad():
        assert_close(compiled(row), layers(row))
        assert_close(compiled(rows), layers(rows))
    products = [len(graph.graph.find_nodes(op="call_function", target=F.linear)) for graph in given]
    assert products == [0, 2]
