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


class Packed(nn.Module):
    """Tokens [1 T 2] through layers; each document reads the mean of the whole row, so numbers leak."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x, cu_seqlens=None):
        return self.last(self.first(x) + 0 * self.first(x).mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("bad", "where"),
    [
        ((4, 5), ", in document 2 of the packed row (tokens 3 to 5)"),
        ((1, 4, 7), ", in document 0 of the packed row (tokens 0 to 2) and 2 more"),
        ((0, 3, 6, 9), ""),
    ],
)
def test_the_document_of_a_packed_row_is_named(bad, where):
    # the second document is empty
    model, x, boundaries = Packed(), torch.ones(1, 10, 2), torch.tensor([0, 3, 3, 6, 9, 10])
    x[:, list(bad), 0] = math.nan
    assert not model(x, cu_seqlens=boundaries).isfinite().any()
    assert first_module(model, lambda: model(x, cu_seqlens=boundaries)) == f"first{where}"
    assert not model._forward_pre_hooks
    # without packing, or as one of several rows, there is none to name
    assert first_module(model, lambda: model(x)) == "first"
    assert first_module(model, lambda: model(x.expand(2, -1, -1), cu_seqlens=boundaries)) == "first"


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
