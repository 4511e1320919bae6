"""Maps of low rank and gated norms against their formulas."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from seqmix import MIXERS
from seqmix.mixers.gates import LowRank, gated_norm

ORDERS = ["norm_first", "gate_first"]


@pytest.mark.parametrize("bias", [False, True])
def test_a_map_of_low_rank_is_two_products(bias):
    torch.manual_seed(0)
    layer = LowRank(6, 2, 5, bias=bias).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() == layer.flops(12)
    expected = x @ layer.down.weight.T @ layer.up.weight.T
    assert_close(y, expected, rtol=0, atol=1e-12)
    if bias:
        torch.nn.init.ones_(layer.up.bias)
        assert_close(layer(x), expected + 1, rtol=0, atol=1e-12)
    layer.reset_parameters()
    names = {"down.weight", "up.weight", "up.bias"} if bias else {"down.weight", "up.weight"}
    assert {name for name, _ in layer.named_parameters()} == names
    assert all((p == 0).all() == (name == "up.bias") for name, p in layer.named_parameters())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_gated_norm_is_its_formula(order, weighted):
    x, gate = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0.5, 2, 6, dtype=torch.float64) if weighted else None
    swish = gate / (1 + (-gate).exp())
    inner = x * swish if order == "gate_first" else x
    expected = inner / (inner.square().mean(-1, keepdim=True) + 0.1).sqrt() * (1 if weight is None else weight)
    if order == "norm_first":
        expected = expected * swish
    assert_close(gated_norm(x, gate, weight, 0.1, order), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_a_gated_norm_stays_in_the_range_of_float16(order):
    x, gate = torch.full((2, 1, 64), 6e4, dtype=torch.float16)
    gate = gate / 10000 if order == "norm_first" else gate
    weight = torch.ones(64)  # a parameter under autocast
    y = gated_norm(x, gate, weight, 1e-6, order)
    assert y.dtype == torch.float16
    assert y.isfinite().all()


def test_gates_are_no_kind_of_mixer():
    assert "gates" not in MIXERS.kinds()
