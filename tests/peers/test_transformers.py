"""Attention against transformers (5.24): Llama's layer, and whole models of Llama and Mistral with a cache.

Their rotations and norms compute in float32 whatever the dtype, so the tolerance is 1e-5.
"""

from importlib.util import find_spec

import pytest
import torch
from torch.testing import assert_close
from transformer_models import LENGTH, VOCAB, agree, compare_logits, converted, mixer_weights

from seqmix.interop.convert.llama import attention
from seqmix.mixers import Paradigm
from seqmix.mixers.attention import AttentionConfig
from seqmix.mixers.parts.rotary import frequencies, rotation

# not importorskip: it would also skip where transformers is installed and its import fails
if find_spec("transformers") is None:
    pytest.skip("needs pip install transformers", allow_module_level=True)

from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

PARADIGMS = list(Paradigm)
D_MODEL, N_HEADS, WINDOW = 48, 4, 7
FIELDS = {
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": N_HEADS,
    "vocab_size": VOCAB,
    "initializer_range": 0.3,  # at 0.02 the weights of attention are all but even
    "attn_implementation": "sdpa",  # their own softmax computes in float32
}


def layers(n_kv_heads):
    """Their layer as a function of x, and ours with the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**FIELDS, num_key_value_heads=n_kv_heads)
    theirs, rotary = LlamaAttention(config, layer_idx=0).double(), LlamaRotaryEmbedding(config)
    torch.nn.init.normal_(theirs.q_proj.weight, std=0.3)
    ours = AttentionConfig(n_heads=N_HEADS, n_kv_heads=n_kv_heads, chunk_size=8)
    ours = ours.build(D_MODEL, layer_idx=0, n_layers=1).double()
    ours.load_state_dict(mixer_weights(attention(ours), ours, theirs.state_dict(), "self_attn"))

    def function(x):
        return theirs(x, rotary(x, torch.arange(x.shape[1])[None]), None)[0]  # without a mask it is causal

    return function, ours


def models(window):
    """Their model (Mistral's is Llama's with a window) and ours with the same weights."""
    torch.manual_seed(0)
    if window is None:
        theirs = LlamaForCausalLM(LlamaConfig(**FIELDS, num_key_value_heads=2))
    else:
        theirs = MistralForCausalLM(MistralConfig(**FIELDS, num_key_value_heads=2, sliding_window=window))
    theirs = theirs.double().eval()
    return theirs, converted("llama" if window is None else "mistral", theirs, chunk_size=8)


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("n_kv_heads", [1, 2, N_HEADS])
def test_layer_output_and_gradient_match_llama(n_kv_heads, paradigm):
    theirs, ours = layers(n_kv_heads)
    x, dy = torch.randn(2, 2, LENGTH, D_MODEL, dtype=torch.float64)
    results = []
    for function in (lambda x: ours(x, paradigm=paradigm)[0], theirs):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.backward(dy)
        results.append((y, leaf.grad))
    agree(*results)


@pytest.mark.parametrize("window", [None, WINDOW], ids=["llama", "mistral"])
@pytest.mark.parametrize("paradigm", PARADIGMS)
@torch.no_grad()
def test_model_logits_match_transformers_whole_packed_and_split(paradigm, window):
    theirs, ours = models(window)
    compare_logits(ours, theirs, {"past_key_values": DynamicCache(config=theirs.config)}, paradigm)


@pytest.mark.parametrize("window", [WINDOW - 1, WINDOW + 1])
@torch.no_grad()
def test_window_off_by_one_does_not_match_mistral(window):
    # a window counts the query's own key in both
    (_, ours), (theirs, _) = models(window), models(WINDOW)
    tokens = torch.randint(VOCAB, (2, LENGTH))
    with pytest.raises(AssertionError, match="not close"):
        agree(ours(tokens).logits, theirs(tokens).logits)


def test_transformers_angles_lose_precision_at_large_positions():
    # position * theta in float32; ours are formed in float64
    positions = torch.tensor([[100, 10**6]])
    theta = frequencies(D_MODEL // N_HEADS, "rope", 10000.0, positions.device)
    ours = rotation(positions, theta, torch.float64).cos[0, :, 0]
    cos, _ = LlamaRotaryEmbedding(LlamaConfig(**FIELDS))(ours, positions)
    theirs = cos[0, :, : len(theta)]  # each is there twice, by halves
    agree(ours[0], theirs[0])
    with pytest.raises(AssertionError, match="not close"):
        assert_close(ours[1], theirs[1], rtol=0, atol=5e-3)
