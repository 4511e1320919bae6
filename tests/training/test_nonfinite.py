"""What is named where numbers stop being finite."""

import math

import pytest
import torch
from torch import nn

from seqmix.training.nonfinite import first_gradient, first_module


class Root(nn.Module):
    def forward(self, x):
        return (x - 1).sqrt(), None


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh(), Root()), nn.Linear(2, 2))


@pytest.fixture
def heads():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))


def test_the_innermost_and_first_module_is_named(model):
    x = torch.ones(1, 2)
    assert first_module(model, lambda: model[:2](x)) == "1.1"  # the root of what is below nothing; outer ones follow
    assert first_module(model, lambda: model[0](x)) is None
    assert not torch.nn.modules.module._global_forward_hooks


def test_a_parameter_of_its_own_that_is_at_fault_is_named(heads):
    with torch.no_grad():
        heads[1].bias[0] = math.inf
    assert first_module(heads, lambda: heads(torch.ones(1, 2))) == "1, whose bias is not finite"


def test_hooks_are_removed_where_the_call_fails(heads):
    with pytest.raises(RuntimeError):
        first_module(heads, lambda: heads(torch.ones(1, 3)))
    assert not torch.nn.modules.module._global_forward_hooks


def test_compiled_code_is_seen_through(heads):
    heads[1].weight.data.fill_(math.nan)
    compiled = torch.compile(heads, backend="eager", fullgraph=True)
    compiled(torch.ones(1, 2))
    assert first_module(heads, lambda: compiled(torch.ones(1, 2))) == "1, whose weight is not finite"
    torch._dynamo.reset()


def test_the_gradient_that_backward_reaches_first_is_named(heads):
    heads(torch.ones(1, 2)).sum().backward()
    assert first_gradient(heads.named_parameters()) is None
    heads[0].weight.grad[0, 0] = math.nan
    heads[1].weight.grad[0, 0] = math.inf
    assert first_gradient(heads.named_parameters()) == "1.weight"
