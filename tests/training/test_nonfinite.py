"""What is named where numbers stop being finite."""

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
def test_a_parameter_of_its_own_that_is_at_fault_is_named(heads, compiled):
    heads[1].bias.data[0] = math.inf
    call = torch.compile(heads, backend="eager", fullgraph=True) if compiled else heads
    call(ONES)
    named = first_module(heads, lambda: call(ONES))
    assert named.startswith("1, ")
    assert "bias" in named
    torch._dynamo.reset()


def test_hooks_are_removed_also_where_the_call_fails(heads):
    assert first_module(heads, lambda: heads(ONES)) is None
    assert not torch.nn.modules.module._global_forward_hooks
    with pytest.raises(RuntimeError):
        first_module(heads, lambda: heads(torch.ones(1, 3)))
    assert not torch.nn.modules.module._global_forward_hooks


def test_the_gradient_that_backward_reaches_first_is_named(heads):
    heads(ONES).sum().backward()
    assert first_gradient(heads.named_parameters()) is None
    heads[0].weight.grad[0, 0] = math.nan
    heads[1].weight.grad[0, 0] = math.inf
    assert first_gradient(heads.named_parameters()) == "1.weight"
