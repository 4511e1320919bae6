"""The gated retention layer against its formulas written out, and its options."""

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from seqmix.mixers import ContractError, Paradigm
from seqmix.mixers import gated_retention as module
from seqmix.mixers.gated_retention import GatedRetention, GatedRetentionConfig

PARADIGMS = list(Paradigm)
D_MODEL = 12


def build(dtype=torch.float64, d_model=D_MODEL, **fields):
    torch.manual_seed(0)
    config = GatedRetentionConfig(**{"n_heads": 3, "chunk_size": 4} | fields)
    return config.build(d_model, layer_idx=0, n_layers=1).to(dtype)


def tokens(length, batch_size=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, length, D_MODEL, dtype=torch.float64, generator=generator).to(dtype)


def exactly(actual, expected, tolerance=1e-9):
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def turned(x, config):
    """Every interleaved pair of [B T H K] as a complex number, turned by its angle."""
    pairs = x.shape[-1] // 2
    steps = {"rope": pairs, "retnet": max(pairs - 1, 1), "none": 1}[config.rotation]
    theta = torch.tensor([config.rotation_base ** (-j / steps) for j in range(pairs)], dtype=torch.float64)
    if config.rotation == "none":
        theta = 0 * theta
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * theta
    return torch.complex(x[..., 0::2], x[..., 1::2]) * torch.polar(torch.ones_like(angles), angles)


def written_out(mixer: GatedRetention, x):
    """The layer from position 0: the score of every pair, by the product of the decays between."""
    config = mixer.config
    *heads, logits = (x @ w.T for w in mixer.in_proj.weight.split([*mixer.widths.values()]))
    heads = [y.unflatten(-1, (config.n_heads, -1)) for y in heads]
    q, k, v, gate = heads if config.rotation == "none" else (*(turned(y, config) for y in heads[:2]), *heads[2:])
    gamma = torch.sigmoid(logits) ** (1 / config.gate_logit_normalizer)
    rows = []
    for n in range(x.shape[1]):
        row = torch.zeros_like(v[:, 0])
        for m in range(n + 1):
            score = (q[:, n] * k[:, m].conj()).sum(-1).real / mixer.key_dim**0.5
            row = row + (score * gamma[:, m + 1 : n + 1].prod(1))[..., None] * v[:, m]
        rows.append(row / (row.square().mean(-1, keepdim=True) + config.norm_eps).sqrt())
    return (gate * torch.sigmoid(gate) * torch.stack(rows, 1)).flatten(2) @ mixer.out_proj.weight.T


OPTIONS = {
    "defaults": {},
    "tau": {"gate_logit_normalizer": 1.0},
    "no rotation": {"rotation": "none", "n_heads": 4},  # keys of 3
    "retnet's angles": {"rotation": "retnet", "rotation_base": 100.0, "norm_eps": 0.01},
    "widths": {"expand_k": 0.5, "expand_v": 2.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_output_and_gradients_are_the_formulas(name):
    mixer = build(**OPTIONS[name])
    x = tokens(11).requires_grad_()
    leaves = [x, *mixer.parameters()]
    expected = written_out(mixer, x)
    upstream = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, leaves, upstream)
    for paradigm in PARADIGMS:
        y, state = mixer(x, paradigm=paradigm)
        assert state is None
        exactly(y, expected)
        for gradient, reference in zip(torch.autograd.grad(y, leaves, upstream), expected_gradients, strict=True):
            exactly(gradient, reference)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_a_token_that_closes_the_gate_forgets_what_came_before(paradigm):
    mixer = build(gate_logit_normalizer=1.0)
    with torch.no_grad():
        mixer.in_proj.weight[-3:].zero_()[:, 0] = 1e4
    first, second, x = tokens(5), tokens(5).flip(1), tokens(3)
    x[:, 0, 0] = -1.0
    y = [mixer(torch.cat((before, x), 1), paradigm=paradigm)[0][:, 5:] for before in (first, second)]
    assert (y[0] - y[1]).abs().max() < 1e-12
    x[:, 0, 0] = 1.0
    y = [mixer(torch.cat((before, x), 1), paradigm=paradigm)[0][:, 5:] for before in (first, second)]
    assert (y[0] - y[1]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_decays_and_the_state_are_wide(dtype, monkeypatch):
    seen, decay = [], module.decay
    monkeypatch.setattr(module, "decay", lambda q, k, v, a, call: seen.append(a) or decay(q, k, v, a, call))
    mixer = build(dtype, expand_v=2.0)
    wide = torch.promote_types(dtype, torch.float32)
    x = tokens(3, 5, dtype)
    for state in (mixer.init_state(5), mixer(x, return_state=True)[1]):
        assert state.memory.shape == (5, 3, 4, 8)
        assert state.memory.dtype == wide
    assert state.position.tolist() == [3] * 5
    with torch.autocast("cpu", torch.bfloat16):
        mixer(x)
    for a in seen:
        assert a.dtype == wide
        assert ((a < 0) & (a > -1)).all()  # 1 in bfloat16
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"gate_logit_normalizer": 0.0}, "greater than or equal to 0.001"),
        ({"rotation": "xpos"}, "'rope', 'retnet' or 'none'"),
        ({"n_heads": 0}, "greater than 0"),
        ({"gamma": 0.9}, "gamma"),
    ],
)
def test_wrong_fields_are_refused(fields, sentence):
    with pytest.raises(ValidationError, match=sentence):
        GatedRetentionConfig(**{"n_heads": 2} | fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"n_heads": 5}, r"5 heads do not divide expand_k \* d_model = 1 \* 12 = 12 evenly"),
        ({"n_heads": 4}, "rotation turns pairs, and a head's keys are 3 wide: make that even"),
    ],
)
def test_heads_that_do_not_fit_the_model_are_refused(fields, sentence):
    with pytest.raises(ContractError, match=sentence):
        GatedRetentionConfig(**fields).build(D_MODEL, layer_idx=0, n_layers=1)
