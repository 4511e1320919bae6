"""Maps of low rank and gated norms against their formulas."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from seqmix import MIXERS
from seqmix.mixers.parts import GatedNorm, LowRank


@pytest.mark.parametrize("bias", [False, True])
def test_a_map_of_low_rank_is_two_products(bias):
    torch.manual_seed(0)
    layer = LowRank(6, 2, 5, bias=bias).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() == 2 * 12 * (6 * 2 + 2 * 5)
    expected = x @ layer.down.weight.T @ layer.up.weight.T
    assert_close(y, expected, rtol=0, atol=1e-12)
    if bias:
        torch.nn.init.ones_(layer.up.bias)
        assert_close(layer(x), expected + 1, rtol=0, atol=1e-12)
    layer.reset_parameters()
    names = {"down.weight", "up.weight", "up.bias"} if bias else {"down.weight", "up.weight"}
    assert {name for name, _ in layer.named_parameters()} == names
    assert all((p == 0).all() == (name == "up.bias") for name, p in layer.named_parameters())


NORMS = {
    "none": lambda x: x,
    "rms": lambda x: x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt(),
    "group": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 0.1).sqrt(),
}
GATES = {
    "none": torch.ones_like,
    "swish": lambda gate: gate / (1 + (-gate).exp()),
    "sigmoid": lambda gate: 1 / (1 + (-gate).exp()),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("affine", [False, True])
def test_a_gated_norm_is_its_formula(norm, gate, affine):
    x, given = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer, weight = GatedNorm(6, norm, gate, affine=affine, eps=0.1).double(), torch.linspace(0.5, 2, 6).double()
    assert [name for name, _ in layer.named_parameters()] == (["weight"] if affine and norm != "none" else [])
    expected = NORMS[norm](x) * GATES[gate](given)
    if layer.weight is not None:
        assert layer.weight.eq(1).all()
        layer.weight.data.copy_(weight)
        expected = expected * weight
    assert_close(layer(x, None if gate == "none" else given), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["rms", "group"])
@pytest.mark.parametrize("gate", ["swish", "sigmoid"])
def test_a_gated_norm_stays_in_the_range_of_float16(norm, gate):
    x, given = torch.randn(2, 1, 64).sign().half() * 6e4
    layer = GatedNorm(64, norm, gate, affine=True, eps=1e-6)  # its parameter is wide, as under autocast
    y = layer(x, given / 10000)
    assert y.dtype == torch.float32
    assert y.isfinite().all()
    assert y.half().isfinite().all()


def test_parts_are_not_mixers():
    assert not {"gates", "parts", "qkv", "short_convolution", "traits", "state"} & set(MIXERS.kinds())
