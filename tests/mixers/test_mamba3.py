"""The Mamba-3 layer against its recurrence written out by token and head, and its options."""

import math

import pytest
import torch
from mixer_formulas import D_MODEL, assert_follows, exactly, rms, tokens

from seqmix.mixers import ContractError, Paradigm
from seqmix.mixers.mamba3 import Mamba3Config


def build(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    config = Mamba3Config(**{"head_dim": 6, "d_state": 8, "chunk_size": 4} | fields)
    mixer = config.build(D_MODEL, layer_idx=0, n_layers=1).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():  # ones and small steps would hide errors
            parameter.add_(0.3 * torch.randn_like(parameter))
        mixer.dt_bias.add_(4)  # steps of about 0.5, in which queries and keys turn
    return mixer


def turned(x, angle):
    """The first pairs (x_2j, x_2j+1) of [B K] as complex numbers, turned by angle [B A]."""
    first, rest = x.split([2 * angle.shape[-1], x.shape[-1] - 2 * angle.shape[-1]], dim=-1)
    pairs = torch.complex(first[:, ::2], first[:, 1::2]) * torch.complex(angle.cos(), angle.sin())
    return torch.cat((torch.view_as_real(pairs).flatten(1), rest), dim=-1)


def written_out(mixer, x):
    """Output and state after the last token, from nothing: the exponential-trapezoidal rule as the paper states it."""
    config, (batch, length, _) = mixer.config, x.shape
    heads, width, keys = mixer.n_heads, config.head_dim, config.d_state
    pairs = int(keys * config.partial_rotary_factor / 2)
    widths = [heads * width, heads * width, config.n_groups * keys, config.n_groups * keys, heads, heads, heads, pairs]
    z, u, b, c, dt, a, trapezoid, theta = (x @ mixer.in_proj.weight.T).split(widths, -1)
    outputs, states = [], []
    for h in range(heads):
        group = h // (heads // config.n_groups)
        q, k = (
            rms(y[..., group * keys : (group + 1) * keys], config.norm_eps) * weight + bias
            for y, weight, bias in zip((c, b), mixer.key_norm.flip(0), mixer.key_bias[:, h].flip(0), strict=True)
        )
        v = u[..., h * width : (h + 1) * width]
        step = (1 + (dt[..., h] + mixer.dt_bias[h]).exp()).log()
        rate = (1 + a[..., h].exp()).log().clamp(min=1e-4)
        lam = 1 / (1 + (-trapezoid[..., h]).exp())
        angle, state, before, rows = x.new_zeros(batch, pairs), x.new_zeros(batch, keys, width), None, []
        for t in range(length):
            angle = angle + step[:, t, None] * math.pi * theta[:, t].tanh()
            query, key = turned(q[:, t], angle), turned(k[:, t], angle)
            alpha, delta, share = ((-step * rate).exp()[:, t], step[:, t], lam[:, t])
            written = key[:, :, None] * v[:, t, None]
            state = alpha[:, None, None] * state + (share * delta)[:, None, None] * written
            if before is not None:
                state = state + ((1 - share) * delta * alpha)[:, None, None] * before
            before = written
            rows.append((query[:, :, None] * state).sum(1) + mixer.D[h] * v[:, t])
        o, gate = torch.stack(rows, 1), z[..., h * width : (h + 1) * width]
        if config.head_norm == "rms":
            o = rms(o, config.norm_eps) * mixer.norm.weight[h]
        outputs.append(o * gate * gate.sigmoid())
        states.append(state)
    return torch.cat(outputs, -1) @ mixer.out_proj.weight.T, torch.stack(states, 1)


OPTIONS = {
    "defaults": {},
    "groups": {"n_groups": 2, "norm_eps": 0.1, "head_norm": "rms"},
    "one head": {"head_dim": 24, "partial_rotary_factor": 1.0},
    "widths": {"expand": 0.5, "d_state": 7, "chunk_size": 5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_output_state_and_gradients_match_written_out_formulas(name):
    assert_follows(build(**OPTIONS[name]), written_out, tokens(11))


@pytest.mark.parametrize("paradigm", list(Paradigm))
def test_angles_continue_from_the_state_and_restart_per_document(paradigm):
    mixer, x = build(), tokens(12, 1)
    whole, final = mixer(x, return_state=True)
    _, state = mixer(x[:, :5], paradigm=paradigm, return_state=True)
    exactly(mixer(x[:, 5:], state, paradigm=paradigm, return_state=True), (whole[:, 5:], final))
    assert final.angle.abs().max() > 2 * math.pi  # all the way round
    packed, states = mixer(x, paradigm=paradigm, cu_seqlens=torch.tensor([0, 5, 5, 12]), return_state=True)
    alone, last = mixer(x[:, 5:], return_state=True)
    exactly(packed[:, 5:], alone)
    exactly(tuple(leaf[2:] for leaf in states), tuple(last))


def test_angles_stay_exact_over_many_tokens():
    mixer, x = build(torch.float32), tokens(3000, 1, torch.float32)
    with torch.no_grad():
        mixer.in_proj.weight[-mixer.pairs :] = 0.5
    angle, state = mixer(x, return_state=True)[1].angle, None
    for part in x.split(700, dim=1):
        state = mixer(part, state, return_state=True)[1]
    assert angle.abs().max() > 2000
    exactly(state.angle, angle, 1e-6)  # in float32 they part by 1e-3


def test_state_too_small_to_rotate_a_pair_raises():
    with pytest.raises(ContractError, match="partial_rotary_factor"):
        build(d_state=3)
