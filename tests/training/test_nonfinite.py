"""The module, tokens or gradient named when values stop being finite."""

import math

import pytest
import torch
from torch import nn

from seqmix.training.nonfinite import first_gradient, first_module

ONES = torch.ones(1, 2)


@pytest.fixture
def heads():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))


@pytest.mark.parametrize("compiled", [False, True])
def test_nonfinite_bias_is_named_with_its_module(heads, compiled):
    heads[1].bias.data[0] = math.inf
    call = torch.compile(heads, backend="eager", fullgraph=True) if compiled else heads
    call(ONES)
    named = first_module(heads, lambda: [call(ONES)])
    assert named.module.startswith("1, ")
    assert "bias" in named.module
    torch._dynamo.reset()


class Leaking(nn.Module):
    """Tokens [B T 2] through layers; each token reads the mean of its row, so numbers leak."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.last(self.first(x) + 0 * self.first(x).mean(1, keepdim=True))


def test_first_module_locates_nonfinite_tokens():
    model, x = Leaking(), torch.ones(2, 5, 2)
    x[1, 3:] = math.nan
    assert not model(x)[1].isfinite().any()
    found = first_module(model, lambda: (model(each) for each in (torch.ones_like(x), x)))
    assert found[:2] == ("first", 1)
    assert found.tokens.nonzero().tolist() == [[1, 3], [1, 4]]
    # a module at fault is at fault everywhere; a later batch that has none else has it of its tokens
    bad = x * math.nan
    assert first_module(model, lambda: (model(each) for each in (bad, x)))[:3] == ("first", 0, None)
    assert first_module(model, lambda: (model(each) for each in (torch.ones_like(x), bad))).tokens.all()


def test_hooks_are_removed_even_when_the_call_fails(heads):
    assert first_module(heads, lambda: [heads(ONES)]) is None
    assert not torch.nn.modules.module._global_forward_hooks
    with pytest.raises(RuntimeError):
        first_module(heads, lambda: [heads(torch.ones(1, 3))])
    assert not torch.nn.modules.module._global_forward_hooks


def test_first_nonfinite_gradient_in_backward_order_is_named(heads):
    heads(ONES).sum().backward()
    assert first_gradient(heads.named_parameters()) is None
    heads[0].weight.grad[0, 0] = math.nan
    heads[1].weight.grad[0, 0] = math.inf
    assert first_gradient(heads.named_parameters()) == "1.weight"
