"""Mamba against transformers (5.24), on its plain torch path, set to compute in float64 throughout."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from mixer_formulas import exactly
from transformer_models import mixer_weights

from seqmix.interop.convert.mamba import Mamba
from seqmix.mixers.mamba import MambaConfig as Config
from seqmix.ops.scan import SCAN_PARADIGMS

# not importorskip: it would also skip where transformers is installed and its import fails
if find_spec("transformers") is None:
    pytest.skip("needs pip install transformers", allow_module_level=True)

from transformers import DynamicCache, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

every_paradigm = pytest.mark.parametrize("paradigm", sorted(SCAN_PARADIGMS))
LENGTH, D_MODEL, D_STATE = 30, 12, 5


@pytest.fixture(autouse=True)
def _their_float_is_double(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)


def as_ours(ours, theirs):
    """Tensors by our names, of theirs by their names."""
    return mixer_weights(Mamba().block(SimpleNamespace(mixer=ours)), ours, theirs, "mixer")


@pytest.fixture
def layers():
    """Their layer, its configuration, and ours with the same weights."""
    torch.manual_seed(0)
    config = MambaConfig(hidden_size=D_MODEL, state_size=D_STATE, time_step_rank=2, num_hidden_layers=1)
    theirs = MambaMixer(config, 0).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours = Config(d_state=D_STATE, dt_rank=2, chunk_size=8).build(D_MODEL, layer_idx=0, n_layers=1).double()
    ours.load_state_dict(as_ours(ours, theirs.state_dict()))
    return theirs, config, ours


@every_paradigm
def test_output_and_gradients_match_transformers(layers, paradigm):
    theirs, _, ours = layers
    x, dy = torch.randn(2, 2, LENGTH, D_MODEL, dtype=torch.float64)
    our_leaves, their_leaves = {"x": x.clone().requires_grad_()}, {"x": x.clone().requires_grad_()}
    y, their_y = ours(our_leaves["x"], paradigm=paradigm)[0], theirs(their_leaves["x"])
    exactly(y, their_y)
    for leaves, module, of in ((our_leaves, ours, y), (their_leaves, theirs, their_y)):
        leaves |= dict(module.named_parameters())
        gradients = torch.autograd.grad(of, list(leaves.values()), dy)
        leaves |= dict(zip(leaves, gradients, strict=True))
    wanted = as_ours(ours, their_leaves) | {"x": their_leaves["x"]}
    for name, gradient in our_leaves.items():
        exactly(gradient, wanted[name])


@every_paradigm
@torch.no_grad()
def test_prompt_and_decoding_steps_match_transformers_with_cache(layers, paradigm):
    theirs, config, ours = layers
    x, cache = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64), DynamicCache(config=config)
    y, state = ours(x[:, :20], paradigm=paradigm, return_state=True)
    exactly(y, theirs(x[:, :20], cache))
    for t in range(20, LENGTH):
        y, state = ours.step(x[:, t : t + 1], state)
        exactly(y, theirs(x[:, t : t + 1], cache))
    exactly(state.memory.mT, cache.get_recurrent_state(0, state_idx=0))
    exactly(state.recent.mT, cache.get_conv_state(0, state_idx=0)[..., -3:])
