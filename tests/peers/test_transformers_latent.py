"""Latent attention against DeepSeek-V3 in transformers (5.24), with its cache.

Its norms, rotation and softmax compute in float32 whatever the dtype, so the tolerance is 1e-5.
"""

from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from transformer_models import LENGTH, agree

from seqmix.mixers import Paradigm
from seqmix.mixers.latent_attention import LatentAttentionConfig

# not importorskip: it would also skip where transformers is installed and its import fails
if find_spec("transformers") is None:
    pytest.skip("needs pip install transformers", allow_module_level=True)

from transformers import DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

D_MODEL, H = 24, 3
SIZES = {"kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}


def layers(q_lora_rank):
    """Their layer, and ours with the same weights; both turn interleaved pairs."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **SIZES,
        q_lora_rank=q_lora_rank,
        hidden_size=D_MODEL,
        num_attention_heads=H,
        num_key_value_heads=H,
        num_hidden_layers=1,
        attn_implementation="eager",
    )
    theirs = DeepseekV3Attention(config, layer_idx=0).double()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.4)
    ours = LatentAttentionConfig(n_heads=H, q_lora_rank=q_lora_rank, chunk_size=8, **SIZES)
    ours = ours.build(D_MODEL, layer_idx=0, n_layers=1).double()
    first = theirs.q_proj if q_lora_rank is None else theirs.q_a_proj
    weights = {
        "in_proj.weight": torch.cat((first.weight, theirs.kv_a_proj_with_mqa.weight)),
        "kv_norm.weight": theirs.kv_a_layernorm.weight,
        "kv_up.weight": theirs.kv_b_proj.weight,
        "out_proj.weight": theirs.o_proj.weight,
    }
    if q_lora_rank is not None:
        weights |= {"q_norm.weight": theirs.q_a_layernorm.weight, "q_up.weight": theirs.q_b_proj.weight}
    ours.load_state_dict(weights)
    return theirs, ours, config


@pytest.mark.parametrize("paradigm", list(Paradigm))
@pytest.mark.parametrize("q_lora_rank", [None, 7])
def test_output_gradient_and_split_decoding_match_deepseek_v3(q_lora_rank, paradigm):
    theirs, ours, config = layers(q_lora_rank)
    x, dy = torch.randn(2, 2, LENGTH, D_MODEL, dtype=torch.float64)
    places, later = torch.arange(LENGTH), torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    mask = torch.zeros(LENGTH, LENGTH).double().masked_fill(later, -torch.inf)
    rotary = DeepseekV3RotaryEmbedding(config)

    def function(x, start=0, stop=LENGTH, cache=None):
        return theirs(x, rotary(x, places[None, start:stop]), mask[start:stop, :stop], cache=cache)[0]

    results = []
    for call in (function, lambda x: ours(x, paradigm=paradigm)[0]):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.backward(dy)
        results.append((y, leaf.grad))
    agree(results[1], results[0])
    state, cache = None, DynamicCache(config=config)
    with torch.no_grad():
        for start, stop in pairwise([0, 12, 13, 20, LENGTH]):
            y, state = ours(x[:, start:stop], state, paradigm=paradigm, return_state=True)
            agree(y, function(x[:, start:stop], start, stop, cache))
            agree(y, results[0][0][:, start:stop])
