"""Lightning attention against the layer of MiniMax-01 in transformers (5.24), at every depth of a model.

Its norm computes in float32, and its slopes divide by L - 1 + 1e-5, which moves a decay by 1e-5: the tolerance is
5e-5.
"""

from importlib.util import find_spec

import pytest
import torch
from torch.testing import assert_close
from transformer_models import mixer_weights

from seqmix.interop.convert.hybrids import MiniMax
from seqmix.mixers import Paradigm
from seqmix.mixers.lightning import LightningConfig

# not importorskip: it would also skip where transformers is installed and its import fails
if find_spec("transformers") is None:
    pytest.skip("needs pip install transformers", allow_module_level=True)

from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

D_MODEL, N_HEADS, N_LAYERS, HEAD_DIM = 24, 3, 4, 10
FIELDS = {
    "hidden_size": D_MODEL,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_HEADS,
    "head_dim": HEAD_DIM,
    "num_hidden_layers": N_LAYERS,
    "hidden_act": "silu",
    "block_size": 8,
}


def layers(layer_idx, n_layers):
    """Their layer, ours with its weights, and what brings a gradient of theirs into the form of ours."""
    torch.manual_seed(0)
    theirs = MiniMaxLightningAttention(MiniMaxConfig(**FIELDS | {"num_hidden_layers": n_layers}), layer_idx).double()
    torch.nn.init.uniform_(theirs.norm.weight, 0.5, 1.5)
    expand = N_HEADS * HEAD_DIM / D_MODEL
    ours = LightningConfig(n_heads=N_HEADS, expand_k=expand, expand_v=expand, chunk_size=7)
    ours = ours.build(D_MODEL, layer_idx=layer_idx, n_layers=n_layers).double()

    names = ("qkv_proj.weight", "output_gate.weight", "norm.weight", "out_proj.weight")

    def mapped(*tensors):
        return mixer_weights(MiniMax().lightning(ours), ours, dict(zip(names, tensors, strict=True)), "self_attn")

    weights = [theirs.get_parameter(name) for name in names]
    ours.load_state_dict(mapped(*weights))
    return theirs, weights, ours, mapped


@pytest.mark.parametrize("paradigm", list(Paradigm))
@pytest.mark.parametrize(("layer_idx", "n_layers"), [*((i, N_LAYERS) for i in range(N_LAYERS)), (0, 1)])
def test_outputs_states_and_gradients_match_minimax_layer(layer_idx, n_layers, paradigm):
    theirs, weights, ours, mapped = layers(layer_idx, n_layers)
    x = torch.randn(2, 30, D_MODEL, dtype=torch.float64, requires_grad=True)
    expected, memory = theirs(x, None, None)
    y, state = ours(x, paradigm=paradigm, return_state=True)
    upstream = torch.randn_like(y)
    dx, *gradients = torch.autograd.grad(expected, [x, *weights], upstream)
    named = dict(ours.named_parameters())
    found = dict(zip(["x", *named], torch.autograd.grad(y, [x, *named.values()], upstream), strict=True))
    assert_close((y, state.memory, found), (expected, memory, {"x": dx, **mapped(*gradients)}), rtol=5e-5, atol=5e-5)
