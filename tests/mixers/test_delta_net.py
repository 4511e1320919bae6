"""The DeltaNet layer against its formulas written out, and its options."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from seqmix.mixers import ContractError, Paradigm
from seqmix.mixers.delta_net import DeltaNet, DeltaNetConfig

PARADIGMS = [Paradigm.CHUNKWISE, Paradigm.RECURRENT]
D_MODEL = 12


def build(dtype=torch.float64, d_model=D_MODEL, **fields):
    torch.manual_seed(0)
    mixer = DeltaNetConfig(**{"n_heads": 3, "chunk_size": 4} | fields).build(d_model, layer_idx=0, n_layers=1)
    torch.nn.init.normal_(mixer.in_proj.weight, std=0.5)
    torch.nn.init.uniform_(mixer.norm.weight, 0.5, 1.5)
    return mixer.to(dtype)


def tokens(length, batch_size=2, dtype=torch.float64, d_model=D_MODEL):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, length, d_model, dtype=torch.float64, generator=generator).to(dtype)


def exactly(actual, expected, tolerance=1e-9):
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def convolved(x, weight):
    """silu(sum_{i<W} weight_{W-1-i} * x_{t-i}) a channel, as torch's own convolution has it."""
    if weight is not None:
        x = torch.nn.functional.conv1d(x.mT, weight[:, None], padding=weight.shape[1] - 1, groups=len(weight))
        x = x[..., : x.shape[2] - weight.shape[1] + 1].mT
    return x * x.sigmoid()


def written_out(mixer: DeltaNet, x):
    """The layer from the first token: output, and the state behind the last one."""
    config, heads = mixer.config, mixer.config.n_heads
    weights = dict(zip(mixer.widths, mixer.in_proj.weight.split([*mixer.widths.values()]), strict=True))
    qkv, beta = [x @ weights[name].T for name in "qkv"], x @ weights["beta"].T
    weight = None if mixer.convolution is None else mixer.convolution.weight
    q, k, v = convolved(torch.cat(qkv, -1), weight).split([*mixer.widths.values()][:3], dim=-1)
    q, k, v = (y.unflatten(-1, (heads, -1)) for y in (q, k, v))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = beta.sigmoid() * (2 if config.allow_neg_eigval else 1)
    state, outputs = x.new_zeros(len(x), heads, mixer.key_dim, mixer.value_dim), []
    for t in range(x.shape[1]):
        key, b = k[:, t, :, :, None], beta[:, t, :, None, None]
        state = state - b * key @ (key.mT @ state) + b * key * v[:, t, :, None]
        outputs.append((q[:, t, :, None] @ state)[:, :, 0] / math.sqrt(mixer.key_dim))
    output = torch.stack(outputs, 1)
    output = output / (output.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * mixer.norm.weight
    if config.gate == "swish":
        output = output * torch.nn.functional.silu(x @ weights["gate"].T).unflatten(-1, (heads, -1))
    return output.flatten(2) @ mixer.out_proj.weight.T, state


OPTIONS = {
    "defaults": {},
    "negative eigenvalues": {"allow_neg_eigval": True},
    "gate": {"gate": "swish", "norm_eps": 0.01},
    "filters of two": {"short_conv": 2},
    "no convolution": {"short_conv": None},
    "widths": {"expand_k": 0.5, "expand_v": 2.0},
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


def test_no_convolution_is_written_in_two_ways():
    one, other = (build(short_conv=size) for size in (None, 0))
    exactly(one(tokens(5))[0], other(tokens(5))[0], tolerance=0)
    assert "convolution" not in dict(one.named_children())
    assert one(tokens(5), return_state=True)[1].recent.numel() == one.init_state(2).recent.numel() == 0


def test_with_the_largest_beta_a_key_is_looked_up():
    # beta 1: what was written last under a key is what it reads, whatever was there
    mixer = build(short_conv=None, n_heads=1, norm_eps=1e-12)
    with torch.no_grad():
        mixer.in_proj.weight[-1] = 0
        mixer.in_proj.weight[-1, 0] = 1e3
        mixer.in_proj.weight[:12] = mixer.in_proj.weight[12:24]  # queries are keys
    x = tokens(6)
    x[..., 0] = 1
    y, _ = mixer(x)
    v = torch.nn.functional.silu(x @ mixer.in_proj.weight[24:36].T)
    exactly(y, (v * v.square().mean(-1, keepdim=True).rsqrt() * mixer.norm.weight) @ mixer.out_proj.weight.T, 1e-5)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_zeros_give_zeros_and_finite_gradients(paradigm):
    mixer = build(torch.bfloat16)
    x = torch.zeros(1, 9, D_MODEL, dtype=torch.bfloat16, requires_grad=True)
    y, state = mixer(x, paradigm=paradigm, return_state=True)
    assert not y.any()
    assert not state.memory.any()
    for gradient in torch.autograd.grad(y.sum(), [x, *mixer.parameters()]):
        assert gradient.isfinite().all()


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
        ({"expand_v": 0.1}, ContractError, r"3 heads do not divide expand_v \* d_model"),
    ],
)
def test_what_does_not_fit_is_refused(fields, error, sentence):
    with pytest.raises(error, match=sentence):
        build(**fields)


def test_weights_start_as_declared():
    mixer = DeltaNetConfig(n_heads=4, gate="swish").build(240, layer_idx=0, n_layers=1)
    weights = [(2**-2.5, w) for w in mixer.in_proj.weight.split([*mixer.widths.values()])] + [
        (0.5, mixer.out_proj.weight)
    ]
    for gain, weight in weights:
        assert_close(weight.abs().max().item(), gain * math.sqrt(6 / sum(weight.shape)), rtol=3e-2, atol=0)
    assert (mixer.norm.weight == 1).all()
    assert 0.49 < mixer.convolution.weight.abs().max() <= 0.5
