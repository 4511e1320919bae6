"""RWKV-7's time mixing against its paper's equations, token by token in plain operations."""

import pytest
import torch
import torch.nn.functional as F
from formulas import D_MODEL, assert_follows, tokens

from seqmix.mixers.rwkv7 import RWKV7Config


def build(layer_idx=1, **fields):
    """A small mixer in which no parameter is all ones or zeros, which would hide that it is there."""
    torch.manual_seed(0)
    config = RWKV7Config(**{"n_heads": 3, "rank": 3, "chunk_size": 4} | fields)
    mixer = config.build(D_MODEL, layer_idx=layer_idx, n_layers=3).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def written_out(mixer, x, first=None):
    """Output and memory, and values where those of the first layer are given."""
    heads, before = mixer.n_heads, F.pad(x, (0, 0, 1, 0))[:, :-1]
    xr, xw, xk, xv, xa, xg = (x + mu * (before - x) for mu in mixer.convolution.weight)
    low_w, low_a, low_g = mixer.decay_proj, mixer.rate_proj, mixer.gate_proj
    r, k, v = (y @ weight.T for y, weight in zip((xr, xk, xv), mixer.in_proj.weight.chunk(3), strict=True))
    w = (xw @ low_w.down.weight.T).tanh() @ low_w.up.weight.T + low_w.up.bias
    w = (-0.6065306597126334 / (1 + (-w).exp())).exp()
    eta = (xa @ low_a.down.weight.T @ low_a.up.weight.T + low_a.up.bias).sigmoid()
    own = v
    if getattr(mixer, "value_proj", None) is not None:
        low = mixer.value_proj
        share = 1 / (1 + (-(xv @ low.down.weight.T @ low.up.weight.T + low.up.bias)).exp())
        v = (1 - share) * v + share * first
    r, k, v, w, eta = (y.unflatten(-1, (heads, -1)) for y in (r, k, v, w, eta))
    kappa = k * mixer.removed
    kappa = kappa / (kappa.square().sum(-1, keepdim=True) + mixer.config.key_eps).sqrt()
    k = k * (1 + (eta - 1) * mixer.replaced)
    state, outputs = x.new_zeros(len(x), heads, k.shape[-1], k.shape[-1]), []
    for t in range(x.shape[1]):
        removed = torch.einsum("bhk,bhkv->bhv", kappa[:, t], state)  # of the state that has not decayed
        state = w[:, t, ..., None] * state - (eta * kappa)[:, t, ..., None] * removed[:, :, None]
        state = state + k[:, t, ..., None] * v[:, t, :, None]
        o = torch.einsum("bhk,bhkv->bhv", r[:, t], state)
        o = o - o.mean(-1, keepdim=True)
        o = o / (o.square().mean(-1, keepdim=True) + mixer.config.norm_eps * k.shape[-1]).sqrt()
        o = o * mixer.norm.weight + mixer.norm.bias
        outputs.append(o + (mixer.norm.bonus * r[:, t] * k[:, t]).sum(-1, keepdim=True) * v[:, t])
    gate = (xg @ low_g.down.weight.T).sigmoid() @ low_g.up.weight.T
    y = (torch.stack(outputs, 1).flatten(2) * gate) @ mixer.out_proj.weight.T
    return y, state, own


def layer(mixer, x):
    return written_out(mixer, x)[:2]


@pytest.mark.parametrize(
    "fields", [{}, {"n_heads": 1, "chunk_size": 7}, {"norm_eps": 0.1, "rank": 1, "gate_rank": 3, "key_eps": 0.5}]
)
def test_output_state_and_gradients_are_the_formulas(fields):
    assert_follows(build(**fields), layer, tokens(11))


def test_it_starts_as_the_authors():
    first, last = (RWKV7Config(n_heads=2).build(128, layer_idx=layer, n_layers=4) for layer in (0, 3))
    assert (first.convolution.weight[:, 0] == 1).all()  # channel 0 has the token before alone
    torch.testing.assert_close(first.convolution.weight[0], 1 - (torch.arange(128) / 128) ** 0.2)
    torch.testing.assert_close(last.norm.weight, torch.ones(2, 64))
    bias = last.decay_proj.up.bias
    torch.testing.assert_close(bias[[0, 63, 64, 127]], torch.tensor([-8.0, -1.5237, -6.4763, 3.0]), atol=1e-3, rtol=0)
    assert (first.removed.max(), first.removed.min()) == (0.76, 0.66)
