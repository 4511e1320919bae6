"""RWKV-4's time mixing against transformers (5.24), whose loop is set to compute in float64 throughout."""

from importlib.util import find_spec

import pytest
import torch
from mixer_formulas import exactly

from seqmix.mixers.rwkv4 import RWKV4Config
from seqmix.ops.scan import SCAN_PARADIGMS

# not importorskip: it would also skip where transformers is installed and its import fails
if find_spec("transformers") is None:
    pytest.skip("needs pip install transformers", allow_module_level=True)

from transformers import RwkvConfig
from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

every_paradigm = pytest.mark.parametrize("paradigm", sorted(SCAN_PARADIGMS))
LENGTH, D_MODEL = 30, 12
NAMES = {"mix_k": "time_mix_key", "mix_v": "time_mix_value", "mix_r": "time_mix_receptance"}
NAMES |= {"time_decay": "time_decay", "time_first": "time_first", "out_proj.weight": "output.weight"}
NAMES |= {
    f"{ours}_proj.weight": f"{theirs}.weight"
    for ours, theirs in zip("kvr", ("key", "value", "receptance"), strict=True)
}


@pytest.fixture
def layers(monkeypatch):
    """Their layer, and ours with the same weights."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    torch.manual_seed(0)
    theirs = RwkvSelfAttention(RwkvConfig(hidden_size=D_MODEL, attention_hidden_size=18), 0).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    ours = RWKV4Config(expand=1.5, chunk_size=8).build(D_MODEL, layer_idx=0, n_layers=1).double()
    ours.load_state_dict({name: theirs.get_parameter(other).squeeze() for name, other in NAMES.items()})
    return theirs, ours


@every_paradigm
def test_output_and_gradients_match_transformers(layers, paradigm):
    theirs, ours = layers
    x, dy = torch.randn(2, 2, LENGTH, D_MODEL, dtype=torch.float64)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, their_y = ours(mine, paradigm=paradigm)[0], theirs(other)[0]
    exactly(y, their_y)
    gradients = torch.autograd.grad(y, [mine, *(ours.get_parameter(name) for name in NAMES)], dy)
    wanted = torch.autograd.grad(their_y, [other, *(theirs.get_parameter(name) for name in NAMES.values())], dy)
    for found, exact in zip(gradients, wanted, strict=True):
        exactly(found, exact.reshape(found.shape))


@every_paradigm
@torch.no_grad()
def test_decoding_steps_after_a_prompt_match_transformers(layers, paradigm):
    theirs, ours = layers
    x = torch.randn(1, LENGTH, D_MODEL, dtype=torch.float64)  # their step mixes the rows of a batch
    # of one layer: the tokens before channel and time mixing, numerator, denominator, maximum
    state = [torch.zeros(1, D_MODEL, 1, dtype=torch.float64) for _ in range(2)]
    state += [torch.full((1, 18, 1), fill, dtype=torch.float64) for fill in (0, 0, -1e38)]
    _, own = ours(x[:, :20], paradigm=paradigm, return_state=True)
    for t in range(20):
        theirs(x[:, t : t + 1], state, use_cache=True)
    for t in range(20, LENGTH):
        y, own = ours.step(x[:, t : t + 1], own)
        exactly(y, theirs(x[:, t : t + 1], state, use_cache=True)[0])
    num, den, largest = (part[..., 0] for part in state[2:])
    exactly(own.memory, torch.stack((num / den, largest + den.log()), 1))
    exactly(own.recent[:, 0], state[1][..., 0])


@every_paradigm
@pytest.mark.parametrize("strength", [1.0, 300.0])
@torch.no_grad()
def test_large_key_weights_match_transformers(layers, paradigm, strength):
    theirs, ours = layers
    ours.k_proj.weight.mul_(strength)
    theirs.key.weight.mul_(strength)
    x = torch.randn(1, LENGTH, D_MODEL, dtype=torch.float64)
    exactly(ours(x, paradigm=paradigm)[0], theirs(x)[0])
