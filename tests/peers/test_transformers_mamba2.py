"""Mamba-2 against transformers (5.24): its layer with its cache, and whole models, on its plain torch path.

That path computes steps, the recurrence and the norms in float32 whatever the dtype, so the tolerance is 1e-5.
"""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from transformer_models import LENGTH, VOCAB, agree, compare_logits, converted, mixer_weights

from seqmix.interop.convert.mamba import Mamba2
from seqmix.mixers import Paradigm
from seqmix.mixers.mamba2 import Mamba2Config as Config

# not importorskip: it would also skip where transformers is installed and its import fails
if find_spec("transformers") is None:
    pytest.skip("needs pip install transformers", allow_module_level=True)

from transformers import DynamicCache, Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

every_paradigm = pytest.mark.parametrize("paradigm", list(Paradigm))
D_MODEL, HEAD_DIM, D_STATE, CHUNK = 24, 12, 6, 8
GROUPS = pytest.mark.parametrize("n_groups", [1, 2, 4])


def their_config(n_groups, **fields):
    return Mamba2Config(
        hidden_size=D_MODEL,
        num_heads=2 * D_MODEL // HEAD_DIM,
        head_dim=HEAD_DIM,
        state_size=D_STATE,
        n_groups=n_groups,
        num_hidden_layers=2,
        chunk_size=CHUNK,
        vocab_size=VOCAB,
        **fields,
    )


def our_config(n_groups, **fields):
    return Config(head_dim=HEAD_DIM, d_state=D_STATE, n_groups=n_groups, chunk_size=5, **fields)


def as_ours(ours, theirs):
    """Tensors by our names, of theirs by their names."""
    return mixer_weights(Mamba2().block(SimpleNamespace(mixer=ours)), ours, theirs, "mixer")


def moved(module):
    """Weights as far from those of initialisation as training takes them: steps of about 1 too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, parameter in module.named_parameters():
            if name.endswith("dt_bias"):
                parameter.uniform_(-5, 1)
    return module.eval()


def layers(n_groups, limit=None):
    """Their layer, its configuration, and ours with the same weights."""
    torch.manual_seed(0)
    config = their_config(n_groups, **({} if limit is None else {"time_step_limit": limit}))
    theirs = moved(Mamba2Mixer(config, layer_idx=0).double())
    ours = our_config(n_groups, time_step_limit=limit).build(D_MODEL, layer_idx=0, n_layers=1).double()
    ours.load_state_dict(as_ours(ours, theirs.state_dict()))
    return theirs, config, ours


@GROUPS
@every_paradigm
@pytest.mark.parametrize("limit", [None, (0.1, 0.8)])
def test_layer_output_and_gradients_match_transformers(n_groups, limit, paradigm):
    theirs, _, ours = layers(n_groups, limit)
    x, dy = torch.randn(2, 2, LENGTH, D_MODEL, dtype=torch.float64)
    our_leaves, their_leaves = ({"x": x.clone().requires_grad_()} for _ in range(2))
    y, their_y = ours(our_leaves["x"], paradigm=paradigm)[0], theirs(their_leaves["x"])
    agree(y, their_y)
    for leaves, module, of in ((our_leaves, ours, y), (their_leaves, theirs, their_y)):
        leaves |= dict(module.named_parameters())
        gradients = torch.autograd.grad(of, list(leaves.values()), dy)
        leaves |= dict(zip(leaves, gradients, strict=True))
    wanted = as_ours(ours, their_leaves) | {"x": their_leaves["x"]}
    for name, gradient in our_leaves.items():
        # where a group's outputs are small, the norm magnifies their rounding: relative to the whole gradient
        assert (gradient - wanted[name]).norm() <= 3e-5 * wanted[name].norm(), name


@GROUPS
@every_paradigm
@torch.no_grad()
def test_layer_decoding_after_a_prompt_matches_transformers_with_cache(n_groups, paradigm):
    theirs, config, ours = layers(n_groups)
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    cache = DynamicCache(config=config)
    y, state = ours(x[:, :20], paradigm=paradigm, return_state=True)
    agree(y, theirs(x[:, :20], cache))
    for t in range(20, LENGTH):
        y, state = ours.step(x[:, t : t + 1], state)
        agree(y, theirs(x[:, t : t + 1], cache))
    agree(state.memory, cache.get_recurrent_state(0, state_idx=0).mT)
    agree(state.recent.mT, cache.get_conv_state(0, state_idx=0)[..., -3:])


@torch.no_grad()
def test_transformers_decoding_ignores_time_step_limits():
    theirs, config, ours = layers(1, (0.1, 0.8))
    x, cache = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64), DynamicCache(config=config)
    whole = theirs(x)
    agree(ours(x[:, 20:], ours(x[:, :20], return_state=True)[1], paradigm=Paradigm.RECURRENT)[0], whole[:, 20:])
    theirs(x[:, :20], cache)
    assert (theirs(x[:, 20:21], cache) - whole[:, 20:21]).abs().max() > 1e-2


@every_paradigm
@torch.no_grad()
def test_model_logits_match_transformers_whole_packed_and_split(paradigm):
    torch.manual_seed(0)
    theirs = moved(Mamba2ForCausalLM(their_config(2, residual_in_fp32=False)).double())
    ours = converted("mamba2", theirs, chunk_size=5)
    compare_logits(ours, theirs, {"cache": DynamicCache(config=theirs.config)}, paradigm)
