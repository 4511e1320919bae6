"""Norms of the residual stream match their formulas."""

import pytest
import torch
from torch.testing import assert_close

from seqmix.blocks.norm.layernorm import LayerNormConfig
from seqmix.blocks.norm.rmsnorm import RmsNormConfig
from seqmix.registry import ConfigError

D_MODEL = 6


def tokens():
    return 3 + 2 * torch.randn(2, 5, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def randomised(norm):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(D_MODEL, generator=generator))
    return norm.double()


@pytest.mark.parametrize("eps", [1e-5, 0.5, 0.0])
@pytest.mark.parametrize("bias", [False, True])
def test_layernorm_matches_formula(eps, bias):
    norm, x = randomised(LayerNormConfig(eps=eps, bias=bias).build(D_MODEL)), tokens()
    variance = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    expected = (x - x.mean(-1, keepdim=True)) / (variance + eps).sqrt() * norm.weight
    assert_close(norm(x), expected + norm.bias if bias else expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eps", [1e-6, 0.5, 0.0])
def test_rmsnorm_matches_formula(eps):
    norm, x = randomised(RmsNormConfig(eps=eps).build(D_MODEL)), tokens()
    expected = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
    assert_close(norm(x), expected, rtol=1e-9, atol=1e-9)


def test_zero_centered_rmsnorm_multiplies_by_one_plus_weight():
    norm, x = randomised(RmsNormConfig(zero_centered=True).build(D_MODEL)), tokens()
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight)
    assert_close(norm(x), expected, rtol=1e-9, atol=1e-9)
    norm.reset_parameters()
    assert norm.weight.tolist() == [0] * D_MODEL


@pytest.mark.parametrize(
    ("config", "eps", "names"),
    [
        (LayerNormConfig(), 1e-5, ["weight"]),
        (LayerNormConfig(bias=True), 1e-5, ["weight", "bias"]),
        (RmsNormConfig(), 1e-6, ["weight"]),
    ],
)
def test_norm_starts_with_unit_weight_and_zero_bias(config, eps, names):
    assert config.eps == eps
    norm = randomised(config.build(D_MODEL))
    norm.reset_parameters()
    assert [name for name, _ in norm.named_parameters()] == names
    for name, parameter in norm.named_parameters():
        assert_close(parameter, torch.full_like(parameter, 1.0 if name == "weight" else 0.0))
    with pytest.raises(ConfigError, match="eps"):
        type(config)(eps=-1e-9)
