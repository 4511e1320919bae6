"""Feed-forward networks match their formulas and have the expected hidden width."""

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from seqmix.blocks.ffn.mlp import MlpConfig
from seqmix.blocks.ffn.swiglu import SwigluConfig
from seqmix.registry import ConfigError

D_MODEL = 6

ACTIVATIONS = {
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "relu2": lambda x: torch.where(x > 0, x * x, 0.0),
}


def tokens():
    return torch.randn(2, 5, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [MlpConfig, SwigluConfig])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_ffn_matches_formula_and_flop_count(config, activation, bias):
    ffn, x = config(expansion=2.5, activation=activation, bias=bias).build(D_MODEL).double(), tokens()
    assert ffn.up_proj.weight.shape == (15, D_MODEL)

    def product(layer, x):
        return x @ layer.weight.T + (layer.bias if bias else 0)

    up, act = product(ffn.up_proj, x), ACTIVATIONS[activation]
    hidden = act(up) if config is MlpConfig else act(product(ffn.gate_proj, x)) * up
    assert_close(ffn(x), product(ffn.down_proj, hidden), rtol=1e-9, atol=1e-9)
    with FlopCounterMode(display=False) as counter:
        ffn(x[:1])
    assert ffn.flops(5) == counter.get_total_flops() > 0


def test_swiglu_8_3_and_mlp_4_have_equal_parameter_counts():
    mlp, swiglu = MlpConfig(expansion=4.0), SwigluConfig(expansion=8 / 3)
    assert (mlp.activation, swiglu.activation) == ("gelu", "silu")
    counts = [sum(p.numel() for p in config.build(384).parameters()) for config in (mlp, swiglu)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("expansion", "d_model", "multiple_of", "width"),
    [
        (2.0, 128, 1, 256),
        (8 / 3, 128, 1, 341),  # 341.33
        (2.67, 50, 1, 134),  # 133.5 and a little: to the even one, as Python rounds
        (2.67, 100, 64, 320),  # 267, up to the next multiple
        (4.0, 64, 64, 256),  # a multiple stays
        (1.0, 3, 8, 8),
    ],
)
def test_hidden_width_is_rounded_then_raised_to_multiple(expansion, d_model, multiple_of, width):
    config = MlpConfig(expansion=expansion, multiple_of=multiple_of)
    assert config.hidden_width(d_model) == width
    assert config.build(d_model).up_proj.out_features == width


@pytest.mark.parametrize("config", [MlpConfig(expansion=4.0), SwigluConfig(expansion=4.0)])
def test_linear_layers_start_within_torch_default_bound(config):
    ffn = config.build(64)
    torch.manual_seed(0)
    ffn.reset_parameters()
    for weight in ffn.parameters():
        bound = weight.shape[1] ** -0.5  # uniform
        assert 0.98 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"expansion": 0.0}, "expansion"),
        ({"expansion": -1.0}, "expansion"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"activation": "tanh"}, "'gelu', 'gelu_tanh', 'silu', 'relu' or 'relu2'"),
    ],
)
def test_invalid_fields_raise(fields, words):
    with pytest.raises(ConfigError, match=words):
        MlpConfig(**{"expansion": 2.0} | fields)
