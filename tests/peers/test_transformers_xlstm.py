"""mLSTM against the xLSTM 7B layer of transformers (5.24), in plain torch and float64.

Its denominator adds `eps` after scaling by its own maximum, so the sum depends on that maximum: `eps` is set to 0.
"""

from importlib.util import find_spec

import pytest
import torch
from mixer_formulas import exactly

from seqmix.mixers import Paradigm
from seqmix.mixers.mlstm import MLSTMConfig

# not importorskip: it would also skip where transformers is installed and its import fails
if find_spec("transformers") is None:
    pytest.skip("needs pip install transformers", allow_module_level=True)

from transformers import xLSTMConfig
from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

every_paradigm = pytest.mark.parametrize("paradigm", list(Paradigm))
LENGTH, D_MODEL, HEADS = 30, 12, 3
PROJECTIONS = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact")


def their_parameters(theirs):
    """By our names, as functions of theirs: projections are one tensor here."""
    named = {"in_proj.weight": torch.cat([theirs.get_parameter(f"{name}.weight") for name in PROJECTIONS])}
    named["gate_bias"] = torch.stack([theirs.igate_preact.bias, theirs.fgate_preact.bias])
    named["norm.weight"] = theirs.multihead_norm.weight.view(HEADS, -1)
    return named | {"out_proj.weight": theirs.out_proj.weight}


@pytest.fixture
def layers(monkeypatch):
    """Their layer, and ours with the same weights."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    torch.manual_seed(0)
    config = xLSTMConfig(
        hidden_size=D_MODEL, num_heads=HEADS, mode="inference", autocast_kernel_dtype="float32", eps=0.0
    )
    theirs = xLSTMLayer(config).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    ours = MLSTMConfig(n_heads=HEADS, chunk_size=8).build(D_MODEL, layer_idx=0, n_layers=1).double()
    ours.load_state_dict(their_parameters(theirs))
    return theirs, ours


@every_paradigm
def test_output_and_gradients_match_transformers(layers, paradigm):
    theirs, ours = layers
    x, dy = torch.randn(2, 2, LENGTH, D_MODEL, dtype=torch.float64)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, their_y = ours(mine, paradigm=paradigm)[0], theirs(other)[0]
    exactly(y, their_y)
    exactly(*(torch.autograd.grad(*of, dy, retain_graph=True) for of in ((y, mine), (their_y, other))))
    y.backward(dy)
    their_y.backward(dy)
    # the gradients of theirs, joined as their weights are
    for parameter in theirs.parameters():
        parameter.data.copy_(parameter.grad)
    wanted = their_parameters(theirs)
    for name, parameter in ours.named_parameters():
        exactly(parameter.grad, wanted[name])


@every_paradigm
@torch.no_grad()
def test_prompt_and_decoding_steps_match_transformers(layers, paradigm):
    theirs, ours = layers
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    y, own = ours(x[:, :20], paradigm=paradigm, return_state=True)
    their_y, state = theirs(x[:, :20])
    exactly(y, their_y)
    for t in range(20, LENGTH):
        y, own = ours.step(x[:, t : t + 1], own)
        their_y, state = theirs(x[:, t : t + 1], state)
        exactly(y, their_y)
    # theirs is scaled by its maximum
    c, n, largest = state
    scale = (largest[..., None] - own.weight[..., None, None]).exp()
    exactly(own.memory, scale * torch.cat((c, n[..., None]), -1))
