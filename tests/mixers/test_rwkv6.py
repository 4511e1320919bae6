"""RWKV-6's time mixing against its paper's equations, token by token in plain operations."""

from itertools import pairwise

import pytest
import torch
from kit_definitions import defined
from mixer_formulas import D_MODEL, assert_follows, exactly, tokens

from seqmix.mixers.rwkv6 import RWKV6Config


def build(layer_idx=1, **fields):
    """A small mixer in which no parameter is all ones or zeros, which would hide that it is there."""
    torch.manual_seed(0)
    config = RWKV6Config(**{"n_heads": 3, "mix_rank": 3, "decay_rank": 2, "chunk_size": 4} | fields)
    mixer = config.build(D_MODEL, layer_idx=layer_idx, n_layers=3).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def written_out(mixer, x):
    """Output and state from the first token."""
    heads, width = mixer.n_heads, mixer.key_dim
    before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
    mu, rank = mixer.token_mix.weight, mixer.config.mix_rank
    low = ((x + mu[0] * (before - x)) @ mixer.token_mix.down.weight.T).tanh()
    mixed = []
    for i in range(5):
        mixtures = mu[1 + i] + low[..., i * rank : (i + 1) * rank] @ mixer.token_mix.up[i]
        mixed.append(x + mixtures * (before - x))
    xw, *others = mixed
    k, v, r, g = others
    wr, wk, wv, wg = mixer.in_proj.weight.split(D_MODEL)
    r, k, v, g = (y.unflatten(-1, (heads, width)) for y in (r @ wr.T, k @ wk.T, v @ wv.T, g @ wg.T))
    low = mixer.decay_proj
    w = ((xw @ low.down.weight.T).tanh() @ low.up.weight.T + low.up.bias).unflatten(-1, (heads, width))
    following = torch.cat((r[:, 1:], torch.zeros_like(r[:, :1])), dim=1)  # a token reads the state before it
    read, state = defined("decay", q=following, k=k, v=v, log_decay=-w.exp())
    o = torch.cat((torch.zeros_like(read[:, :1]), read[:, :-1]), dim=1)
    o = o + (r * mixer.bonus * k).sum(-1, keepdim=True) * v
    o = o - o.mean(-1, keepdim=True)
    o = o / (o.square().mean(-1, keepdim=True) + width * mixer.config.norm_eps).sqrt()
    o = (o * mixer.norm.weight + mixer.norm.bias) * g * g.sigmoid()
    return o.flatten(2) @ mixer.out_proj.weight.T, state


@pytest.mark.parametrize("fields", [{}, {"n_heads": 1, "mix_rank": 1}, {"norm_eps": 0.1, "decay_rank": 5}])
def test_output_state_and_gradients_match_written_out_formulas(fields):
    assert_follows(build(**fields), written_out, tokens(11))


@pytest.mark.parametrize("paradigm", ["parallel", "recurrent", "chunkwise"])
@pytest.mark.parametrize("boundaries", [[0, 4, 4, 11], [0, 0, 1, 11]])
def test_packed_documents_with_initial_states_match_separate_documents(paradigm, boundaries):
    mixer, x = build(), tokens(11, 1)
    state = mixer.init_state(3)
    state = state._replace(memory=torch.randn_like(state.memory), recent=torch.randn_like(state.recent))
    y, after = mixer(x, state, paradigm=paradigm, cu_seqlens=torch.tensor(boundaries), return_state=True)
    for n, (start, end) in enumerate(pairwise(boundaries)):
        alone = type(state)(*(leaf[n : n + 1] for leaf in state))
        expected = torch.empty(1, 0, D_MODEL, dtype=torch.float64)
        if end > start:
            expected, alone = mixer(x[:, start:end], alone, paradigm="recurrent", return_state=True)
        exactly(y[:, start:end], expected)
        exactly(tuple(leaf[n : n + 1] for leaf in after), tuple(alone))


def test_closed_gate_state_matches_written_out_formulas():
    mixer, x = build(), tokens(11)
    with torch.no_grad():
        mixer.decay_proj.up.bias.fill_(1000.0)
    y, state = mixer(x, return_state=True)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), list(mixer.parameters())))
    torch.testing.assert_close(state.memory, written_out(mixer, x)[1])


def test_initial_parameters_match_the_authors_code():
    first, last = (RWKV6Config(n_heads=2).build(128, layer_idx=layer, n_layers=4) for layer in (0, 3))
    channel = torch.arange(128) / 128
    torch.testing.assert_close(first.token_mix.weight[1], 1 - channel)
    torch.testing.assert_close(last.token_mix.weight[3], 1 - channel**0.25 - 0.3)
    torch.testing.assert_close(last.token_mix.weight[5], 1 - channel**0.125)
    bias = last.decay_proj.up.bias
    torch.testing.assert_close(bias[[0, 127]], torch.tensor([-6.0, -1.0]))
    torch.testing.assert_close(last.bonus.flatten()[[0, 1, 2]], torch.tensor([1.0, 126 / 127 + 0.1, 125 / 127 - 0.1]))
