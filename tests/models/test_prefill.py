"""Segmented and compiled prefill matches prefill in one pass."""

import sys

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

from seqmix import MIXERS, SeqmixError
from seqmix.mixers.base.state import to_dict
from seqmix.models import prefill

module = sys.modules[prefill.__module__]
CONSTANT = [kind for kind in MIXERS.kinds() if MIXERS.resolve(kind).example().traits.state == "constant"]
PROMPTS = [
    torch.randint(0, 257, (n,), generator=torch.Generator().manual_seed(n)) for n in (13, 1, 4, 17)
]  # that end inside segments of 5, at their ends, and span several


def states(state):
    return list(to_dict(state).values())


@pytest.mark.parametrize("kind", CONSTANT)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["many", "one"])
def test_segmented_prefill_matches_one_pass(model_of, monkeypatch, kind, prompts):
    model, lengths = model_of(kind), []
    logits, state = prefill(model, prompts, max_length=20)
    monkeypatch.setattr(module, "SEGMENT", 5)
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    found, found_state = prefill(model, prompts, max_length=20)
    assert_close(found, logits, rtol=1e-9, atol=1e-9)
    for actual, expected in zip(states(found_state), states(state), strict=True):
        assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    if len(prompts) == 1 or all(block.mixer.traits.packing for block in model.blocks):
        total = sum(len(prompt) for prompt in prompts)
        assert lengths == [5] * (total // 5) + [total % 5] * bool(total % 5)
    assert max(lengths) == 5


@pytest.mark.parametrize("kinds", [("attention",), ("retention", "hyena")])
def test_growing_state_is_prefilled_in_one_pass(model_of, monkeypatch, kinds):
    model, lengths = model_of(*kinds), []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    monkeypatch.setattr(module, "SEGMENT", 5)
    prefill(model, PROMPTS[:1])
    assert lengths == [13]


@pytest.mark.usefixtures("plainly_compiled")
def test_prompts_of_all_lengths_share_one_graph(model_of):
    model = model_of("retention", n_layers=1)
    for length in (9, 30, 64, 17):
        prompt = torch.randint(0, 257, (length,), generator=torch.Generator().manual_seed(0))
        logits, state = prefill(model, [prompt], max_length=length + 5)
        found, found_state = prefill(model, [prompt], max_length=length + 5, compiled=True)
        assert_close(found, logits)
        for actual, expected in zip(states(found_state), states(state), strict=True):
            assert_close(actual, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_compiled_prefill_of_growing_state_raises(model_of):
    with pytest.raises(SeqmixError, match="prefill"):
        prefill(model_of("attention"), PROMPTS, compiled=True)
