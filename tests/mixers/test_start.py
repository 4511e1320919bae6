"""Initial parameters follow each paper's code."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from seqmix.mixers import MIXERS


def build(kind, d_model, *, n_layers=1, **fields):
    torch.manual_seed(0)
    return MIXERS.resolve(kind)(**fields).build(d_model, layer_idx=0, n_layers=n_layers)


@pytest.mark.parametrize(
    ("kind", "gain", "gain_out", "fields"),
    [
        ("attention", 2**-0.5, 1.0, {"n_kv_heads": 1}),
        ("retention", 2**-2.5, 0.5, {}),
        ("lightning", 2**-0.5, 1.0, {}),
        ("linear_attention", 2**-0.5, 1.0, {"expand_v": 2.0}),
        ("delta_net", 2**-2.5, 0.5, {"gate": "swish"}),
    ],
)
def test_each_projection_is_xavier_uniform_for_its_shape(kind, gain, gain_out, fields):
    mixer = build(kind, 240, n_heads=4, **fields)
    widths = [*mixer.widths.values()] if isinstance(mixer.widths, dict) else mixer.widths
    assert sum(widths) == mixer.in_proj.out_features
    for weight in (*mixer.in_proj.weight.split(widths), mixer.out_proj.weight):
        bound = (gain_out if weight is mixer.out_proj.weight else gain) * math.sqrt(6 / sum(weight.shape))
        # few rows (one per head) seldom come near the bound
        assert (0.97 if len(weight) < 10 else 0.99) * bound < weight.abs().max() <= bound * (1 + 1e-6)
    assert mixer.in_proj.bias is mixer.out_proj.bias is None
    if kind == "delta_net":
        assert (mixer.norm.weight == 1).all()
        assert 0.49 < mixer.convolution.weight.abs().max() <= 0.5


def test_gated_delta_net_decays_start_as_in_the_authors_code():
    mixer = build("gated_delta_net", 512, n_heads=512)
    rates, steps = mixer.decay.A_log.exp(), F.softplus(mixer.decay.dt_bias)
    assert 0 < rates.min() < 0.2
    assert 15.8 < rates.max() <= 16
    assert_close(rates.mean().item(), 8.0, rtol=0.1, atol=0)
    assert 0.001 <= steps.min() * 1.001 < 0.0012
    assert 0.09 < steps.max() <= 0.1001
    assert_close(steps.log().mean().item(), math.log(0.01), rtol=0.05, atol=0)
    assert (mixer.norm.weight == 1).all()


def test_mamba2_parameters_start_as_in_the_authors_code():
    ranges = {"a_range": (2.0, 5.0), "time_step_range": (1e-4, 10.0)}
    mixer = build("mamba2", 400, n_layers=4, head_dim=1, d_state=16, **ranges)
    steps, rates = mixer.decay(torch.zeros(1, 1, mixer.n_heads))[0][0, 0], mixer.decay.A_log.exp()
    assert_close(torch.stack((steps.min(), steps.max())), torch.tensor([1e-4, 10]), rtol=5e-2, atol=0)
    assert (steps < 10**-1.5).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert_close(torch.stack((rates.min(), rates.mean(), rates.max())), torch.tensor([2, 3.5, 5]), rtol=2e-2, atol=0)
    for name, bound in {"in_proj": 400**-0.5, "out_proj": 800**-0.5 / 2}.items():
        assert_close(getattr(mixer, name).weight.abs().max().item(), bound, rtol=1e-2, atol=0)
    assert 0.49 < mixer.convolution.bias.abs().max() <= 0.5
    assert mixer.D.eq(1).all()
    assert mixer.norm_weight.eq(1).all()


def test_mamba3_parameters_start_as_in_the_authors_code():
    mixer = build("mamba3", 400, n_layers=4, head_dim=1, d_state=16)
    steps = F.softplus(mixer.dt_bias)
    assert_close(torch.stack((steps.min(), steps.max())), torch.tensor([1e-3, 0.1]), rtol=5e-2, atol=0)
    assert all((one == 1).all() for one in (mixer.key_bias, mixer.key_norm, mixer.D))
    assert_close(mixer.out_proj.weight.abs().max().item(), 800**-0.5 / 2, rtol=1e-2, atol=0)


def test_hyena_parameters_start_as_in_the_authors_code():
    mixer = build("hyena", 64, sine_frequency=14.0)
    for layer in (mixer.in_proj, mixer.out_proj, *mixer.filter_layers, mixer.filter_out):
        bound = layer.in_features**-0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound
    assert (mixer.frequency == 14).all()
    assert 0.8 < mixer.skip.std() < 1.2
