"""The Gated DeltaNet layer against its formulas written out, and its options."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.testing import assert_close

from seqmix.mixers import ContractError, Paradigm
from seqmix.mixers.delta_net import DeltaNetConfig
from seqmix.mixers.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig

PARADIGMS = [Paradigm.CHUNKWISE, Paradigm.RECURRENT]
D_MODEL = 12


def build(dtype=torch.float64, d_model=D_MODEL, **fields):
    torch.manual_seed(0)
    mixer = GatedDeltaNetConfig(**{"n_heads": 3, "chunk_size": 4} | fields).build(d_model, layer_idx=0, n_layers=1)
    torch.nn.init.normal_(mixer.in_proj.weight, std=0.5)
    torch.nn.init.uniform_(mixer.norm.weight, 0.5, 1.5)
    return mixer.to(dtype)


def tokens(length, batch_size=2, dtype=torch.float64, d_model=D_MODEL):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, length, d_model, dtype=torch.float64, generator=generator).to(dtype)


def exactly(actual, expected, tolerance=1e-9):
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def written_out(mixer: GatedDeltaNet, x):
    """The layer from the first token: output, and the state behind the last one."""
    config, heads = mixer.config, mixer.config.n_heads
    *qkv, gate, beta, dt = ((x @ w.T) for w in mixer.in_proj.weight.split([*mixer.widths.values()]))
    qkv = torch.cat(qkv, -1)
    if mixer.convolution is not None:
        weight = mixer.convolution.weight
        qkv = sum(weight[:, -1 - i] * F.pad(qkv, (0, 0, i, 0))[:, : x.shape[1]] for i in range(weight.shape[1]))
    q, k, v = (y.unflatten(-1, (heads, -1)) for y in F.silu(qkv).split([*mixer.widths.values()][:3], dim=-1))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = beta.sigmoid() * (2 if config.allow_neg_eigval else 1)
    a = (-mixer.decay.A_log.exp() * torch.log1p((dt + mixer.decay.dt_bias).exp())).exp()
    state, outputs = x.new_zeros(len(x), heads, mixer.key_dim, mixer.value_dim), []
    for t in range(x.shape[1]):
        key, b = k[:, t, :, :, None], beta[:, t, :, None, None]
        state = a[:, t, :, None, None] * (state - b * key @ (key.mT @ state)) + b * key * v[:, t, :, None]
        outputs.append((q[:, t, :, None] @ state)[:, :, 0] / math.sqrt(mixer.key_dim))
    output = torch.stack(outputs, 1)
    output = output / (output.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * mixer.norm.weight
    output = output * F.silu(gate).unflatten(-1, (heads, -1))
    return output.flatten(2) @ mixer.out_proj.weight.T, state


OPTIONS = {
    "defaults": {},
    "negative eigenvalues": {"allow_neg_eigval": True},
    "filters of two": {"short_conv": 2, "norm_eps": 0.01},
    "no convolution": {"short_conv": 0},
    "widths": {"expand_k": 0.75, "expand_v": 1.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_output_state_and_gradients_are_the_formulas(name):
    mixer = build(**OPTIONS[name])
    x = tokens(11).requires_grad_()
    leaves = [x, *mixer.parameters()]
    expected, expected_state = written_out(mixer, x)
    upstream = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, leaves, upstream)
    for paradigm in PARADIGMS:
        y, state = mixer(x, paradigm=paradigm, return_state=True)
        exactly(y, expected)
        exactly(state.memory, expected_state)
        for gradient, reference in zip(torch.autograd.grad(y, leaves, upstream), expected_gradients, strict=True):
            exactly(gradient, reference)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_without_forgetting_it_is_a_gated_delta_net_and_forgetting_all_leaves_a_token_alone(paradigm):
    mixer, x = build(expand_v=1.0, short_conv=None), tokens(9)
    other = DeltaNetConfig(n_heads=3, gate="swish", short_conv=None).build(D_MODEL, layer_idx=0, n_layers=1).double()
    weights = {name: x for name, x in mixer.state_dict().items() if name not in ("decay.A_log", "decay.dt_bias")}
    other.load_state_dict(weights | {"in_proj.weight": mixer.in_proj.weight[:-3]})
    with torch.no_grad():
        mixer.decay.A_log.fill_(-math.inf)
        exactly(mixer(x, paradigm=paradigm)[0], other(x)[0])
        mixer.decay.A_log.fill_(1e3)  # a log-decay of -inf at every token
        whole = mixer(x, paradigm=paradigm)[0]
        exactly(whole, torch.cat([mixer(x[:, t : t + 1])[0] for t in range(9)], 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_low_precision_stays_near_over_many_tokens(paradigm, dtype):
    mixer, x = build(d_model=96, n_heads=2, chunk_size=64), tokens(1000, 1, d_model=96)
    exact = mixer(x)[0]
    y = mixer.to(dtype)(x.to(dtype), paradigm=paradigm)[0].double()
    assert (y - exact)[:, -100:].norm() / exact[:, -100:].norm() <= 3e-2


@pytest.mark.parametrize(
    ("fields", "error", "sentence"),
    [
        ({"short_conv": -1}, ValidationError, "greater than or equal to 0"),
        ({"gate": "relu"}, ValidationError, "'swish', 'sigmoid' or 'none'"),
        ({"paradigm": "parallel"}, ValidationError, "has no paradigm 'parallel'; it declares chunkwise, recurrent"),
        ({"n_heads": 5}, ContractError, r"5 heads do not divide expand_k \* d_model = 1 \* 12 = 12 evenly"),
    ],
)
def test_what_does_not_fit_is_refused(fields, error, sentence):
    with pytest.raises(error, match=sentence):
        build(**fields)


def test_decays_start_as_the_authors():
    mixer = GatedDeltaNetConfig(n_heads=512).build(512, layer_idx=0, n_layers=1)
    rates, steps = mixer.decay.A_log.exp(), F.softplus(mixer.decay.dt_bias)
    assert 0 < rates.min() < 0.2
    assert 15.8 < rates.max() <= 16
    assert_close(rates.mean().item(), 8.0, rtol=0.1, atol=0)
    assert 0.001 <= steps.min() * 1.001 < 0.0012
    assert 0.09 < steps.max() <= 0.1001
    assert_close(steps.log().mean().item(), math.log(0.01), rtol=0.05, atol=0)
    assert (mixer.norm.weight == 1).all()
