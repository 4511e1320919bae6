"""Mixers of the scan family against their papers' equations, token by token in plain operations, with every option."""

import math

import pytest
import torch
from kit_definitions import defined_scan
from mixer_formulas import D_MODEL, assert_follows, convolved, tokens

from seqmix.mixers import MIXERS
from seqmix.mixers.parts.scan_state import ScanConfig


def build(kind, dtype=torch.float64, **fields):
    """A small mixer in which no parameter is all ones or zeros, which would hide that it is there."""
    torch.manual_seed(0)
    config = MIXERS.resolve(kind)(**{"chunk_size": 4} | SMALL[kind] | fields)
    mixer = config.build(D_MODEL, layer_idx=1, n_layers=3).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def rg_lru(mixer, x):
    config, width = mixer.config, mixer.width
    u, gate = (x @ mixer.in_proj.weight.T + mixer.in_proj.bias).split(width, -1)
    u = convolved(u, mixer.convolution.weight) + mixer.convolution.bias
    r, i, size = [], [], width // config.n_heads
    for head in range(config.n_heads):
        own = u[..., head * size : (head + 1) * size]
        logits = own @ mixer.gate_weight[head] + mixer.gate_bias[head]
        r.append(1 / (1 + (-logits[..., :size]).exp()))
        i.append(1 / (1 + (-logits[..., size:]).exp()))
    log_a = -8 * (1 + mixer.rate.exp()).log() * torch.cat(r, -1)
    kept = (1 - log_a.exp() ** 2).sqrt()
    if config.unit_start:
        kept = torch.cat((torch.ones_like(kept[:, :1]), kept[:, 1:]), 1)
    outputs, h = defined_scan("scan", x=kept * torch.cat(i, -1) * u, log_decay=log_a)
    gelu = 0.5 * gate * (1 + (math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)).tanh())
    return (outputs * gelu) @ mixer.out_proj.weight.T + mixer.out_proj.bias, h


def mamba(mixer, x):
    width, n = len(mixer.D), len(mixer.A_log)
    u, z = (x @ mixer.in_proj.weight.T).split(width, -1)
    u = convolved(u, mixer.convolution.weight) + mixer.convolution.bias
    u = u * u.sigmoid()
    dt, b, c = (u @ mixer.x_proj.weight.T).split([mixer.dt_proj.in_features, n, n], -1)
    step = (1 + (dt @ mixer.dt_proj.weight.T + mixer.dt_proj.bias).exp()).log()
    rate = -mixer.A_log.exp()
    outputs, h = defined_scan("selective_scan", x=step * u, step=step, rate=rate, k=b, q=c, d_state=n)
    return ((outputs + mixer.D * u) * z * z.sigmoid()) @ mixer.out_proj.weight.T, h


def min_gru(mixer, x):
    config = mixer.config
    if config.short_conv:
        x = convolved(x, mixer.convolution.weight) + mixer.convolution.bias
    w_z, w_h = mixer.in_proj.weight.chunk(2)
    z, v = 1 / (1 + (-x @ w_z.T).exp()), x @ w_h.T
    if config.candidate == "positive":
        v = v.clamp(min=0) + 1 / (1 + (-v.clamp(max=0)).exp())
    outputs, h = defined_scan("scan", x=z * v, log_decay=(1 - z).log())
    return outputs @ mixer.out_proj.weight.T, h


def rwkv4(mixer, x):
    shifted = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
    k, v, r = (
        (mu * x + (1 - mu) * shifted) @ layer.weight.T
        for mu, layer in ((mixer.mix_k, mixer.k_proj), (mixer.mix_v, mixer.v_proj), (mixer.mix_r, mixer.r_proj))
    )
    w, num, den, outputs = mixer.time_decay.exp(), torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), []
    for t in range(x.shape[1]):
        now = (mixer.time_first + k[:, t]).exp()
        outputs.append((num + now * v[:, t]) / (den + now))
        num, den = ((-w).exp() * old + k[:, t].exp() * new for old, new in ((num, v[:, t]), (den, 1)))
    y = (r.sigmoid() * torch.stack(outputs, 1)) @ mixer.out_proj.weight.T
    return y, torch.stack((num / den, den.log()), 1)


def h3(mixer, x):
    q, k, v = (x @ mixer.in_proj.weight.T).chunk(3, -1)
    u = convolved(k, mixer.convolution.weight) * v
    step, a = mixer.log_step.exp(), torch.complex(-mixer.A_log.exp(), mixer.A_imag)
    b, c = ((step * a).exp() - 1) / a, torch.view_as_complex(mixer.C)
    turn, weight = step * a, torch.view_as_real(2 * c * b)  # the discrete input weights stand at the output
    outputs, h = defined_scan("diagonal_scan", x=u, log_decay=turn.real, angle=turn.imag, weight=weight, d_state=len(a))
    return (q * (outputs + mixer.D * u)) @ mixer.out_proj.weight.T, h


SMALL = {"h3": {"d_state": 6}, "rwkv4": {}, "min_gru": {}, "rg_lru": {"n_heads": 3}, "mamba": {"d_state": 4}}
OPTIONS = {
    "h3": [{}, {"d_state": 2, "short_conv": 1}],
    "rwkv4": [{}, {"expand": 1.5}],
    "min_gru": [{}, {"candidate": "linear", "expand": 2.0}, {"short_conv": 3}],
    "mamba": [{}, {"dt_rank": 3, "d_state": 1, "short_conv": 1}, {"expand": 0.5, "chunk_size": 3}],
    "rg_lru": [{}, {"unit_start": False, "short_conv": 2}, {"n_heads": 1, "expand": 0.5, "short_conv": 1}],
}
CASES = [pytest.param(kind, fields, id=f"{kind} {fields}") for kind, of in OPTIONS.items() for fields in of]


def test_every_scan_mixer_has_cases():
    kinds = {kind for kind, config in MIXERS.built_in().items() if issubclass(config, ScanConfig)}
    assert set(OPTIONS) == set(SMALL) == kinds


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_output_state_and_gradients_match_written_out_formulas(kind, fields):
    assert_follows(build(kind, **fields), globals()[kind], tokens(11))


def test_closed_rg_lru_gates_have_finite_gradients():
    # a = 1, and the square root of 0
    mixer, x = build("rg_lru", torch.float32), tokens(9, dtype=torch.float32).requires_grad_()
    torch.nn.init.constant_(mixer.gate_bias, -200.0)
    y, state = mixer(x, return_state=True)
    gradients = torch.autograd.grad(y.sum() + state.memory.sum(), [x, *mixer.parameters()])
    assert all(part.isfinite().all() for part in (y, state.memory, *gradients))
