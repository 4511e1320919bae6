"""RWKV's channel mixing against its equations, with and without a gate, split into two segments."""

import pytest
import torch
from mixer_formulas import D_MODEL, exactly, tokens

from seqmix.mixers.channel_mix import ChannelMixConfig


@pytest.mark.parametrize("gate", [True, False])
def test_output_state_and_gradients_match_written_out_formulas(gate):
    torch.manual_seed(0)
    mixer = ChannelMixConfig(expansion=1.5, gate=gate).build(D_MODEL, layer_idx=1, n_layers=3).double()
    torch.nn.init.uniform_(mixer.shift)
    x = tokens(11).requires_grad_()
    before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
    if gate:
        k, r = (mu * x + (1 - mu) * before for mu in mixer.shift)
    else:
        k, r = x + mixer.shift[0] * (before - x), None
    y = (k @ mixer.k_proj.weight.T).clamp(min=0) ** 2 @ mixer.v_proj.weight.T
    if r is not None:
        y = y / (1 + (-r @ mixer.r_proj.weight.T).exp())
    first, state = mixer(x[:, :7], return_state=True)
    second, state = mixer(x[:, 7:], state, return_state=True)
    found = torch.cat((first, second), 1)
    exactly(found, y)
    exactly(state.recent, x[:, -1:])
    weights = [x, *mixer.parameters()]
    for one, other in zip(
        torch.autograd.grad(found.sum(), weights), torch.autograd.grad(y.sum(), weights), strict=True
    ):
        exactly(one, other)
