"""RWKV-7's time mixing against its paper's equations, token by token in plain operations."""

import pytest
import torch
from mixer_formulas import D_MODEL, assert_follows, tokens
from rwkv7_formula import rwkv7_written_out

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


def layer(mixer, x):
    return rwkv7_written_out(mixer, x)[:2]


@pytest.mark.parametrize(
    "fields", [{}, {"n_heads": 1, "chunk_size": 7}, {"norm_eps": 0.1, "rank": 1, "gate_rank": 3, "key_eps": 0.5}]
)
def test_output_state_and_gradients_match_written_out_formulas(fields):
    assert_follows(build(**fields), layer, tokens(11))


def test_initial_parameters_match_the_authors_code():
    first, last = (RWKV7Config(n_heads=2).build(128, layer_idx=layer, n_layers=4) for layer in (0, 3))
    assert (first.convolution.weight[:, 0] == 1).all()  # channel 0 has the token before alone
    torch.testing.assert_close(first.convolution.weight[0], 1 - (torch.arange(128) / 128) ** 0.2)
    torch.testing.assert_close(last.norm.weight, torch.ones(2, 64))
    bias = last.decay_proj.up.bias
    torch.testing.assert_close(bias[[0, 63, 64, 127]], torch.tensor([-8.0, -1.5237, -6.4763, 3.0]), atol=1e-3, rtol=0)
    assert (first.removed.max(), first.removed.min()) == (0.76, 0.66)
