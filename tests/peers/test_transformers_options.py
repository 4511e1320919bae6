"""Attention options against the layers of transformers (5.24) that have them: Qwen3, Qwen3-Next, Gemma 2, gpt-oss.

Their rotations, norms and, except in gpt-oss, softmax compute in float32 whatever the dtype: the tolerance is 1e-5.
"""

from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from transformer_models import LENGTH, agree, mixer_weights

from seqmix.interop.convert.hybrids import Qwen3Next
from seqmix.interop.convert.llama import attention
from seqmix.mixers import Paradigm
from seqmix.mixers.attention import AttentionConfig

# not importorskip: it would also skip where transformers is installed and its import fails
if find_spec("transformers") is None:
    pytest.skip("needs pip install transformers", allow_module_level=True)

from transformers import Gemma2Config, GptOssConfig, Qwen3Config, Qwen3NextConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

D_MODEL, H, G, K, WINDOW = 24, 4, 2, 8, 7
FIELDS = {
    "hidden_size": D_MODEL,
    "num_attention_heads": H,
    "num_key_value_heads": G,
    "head_dim": K,
    "num_hidden_layers": 2,
    "attention_bias": False,
    "attn_implementation": "eager",
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
QWEN3_NEXT = ROPE | {"partial_rotary_factor": 0.5}
KINDS = {
    "qwen3": (Qwen3Attention, Qwen3RotaryEmbedding, Qwen3Config(**FIELDS), {"qk_norm": "rms"}),
    "qwen3_next": (
        Qwen3NextAttention,
        Qwen3NextRotaryEmbedding,
        Qwen3NextConfig(**FIELDS, rope_parameters=QWEN3_NEXT),
        {"qk_norm": "rms_zero_centered", "gate": "sigmoid", "partial_rotary_factor": 0.5},
    ),
    "gemma2": (
        Gemma2Attention,
        Gemma2RotaryEmbedding,
        Gemma2Config(
            **FIELDS,
            query_pre_attn_scalar=K,
            attn_logit_softcapping=1.5,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
        ),
        {"softcap": 1.5, "window": WINDOW},
    ),
    "gpt_oss": (
        GptOssAttention,
        GptOssRotaryEmbedding,
        GptOssConfig(**FIELDS, sliding_window=WINDOW, rope_parameters=ROPE),
        {"sinks": True, "window": WINDOW},
    ),
}


def weights_of(theirs, ours):
    if ours.config.gate != "none":
        layout = Qwen3Next().attention(ours)
    else:
        layout = attention(ours) | {"mixer.sinks": "self_attn.sinks"}
    return mixer_weights(layout, ours, theirs.state_dict(), "self_attn")


def layers(kind):
    """Their layer as a function of x, and ours with the same weights."""
    torch.manual_seed(0)
    attention, rotary, config, fields = KINDS[kind]
    theirs = attention(config, layer_idx=0).double()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and kind == "qwen3"), std=0.4)
    ours = AttentionConfig(n_heads=H, n_kv_heads=G, head_dim=K, chunk_size=8, **fields)
    ours = ours.build(D_MODEL, layer_idx=0, n_layers=1).double()
    ours.load_state_dict(weights_of(theirs, ours))
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    seen = (distance >= 0) & (distance < fields.get("window", LENGTH))
    mask = torch.zeros(LENGTH, LENGTH).double().masked_fill(~seen, -torch.inf)

    def function(x):
        return theirs(x, rotary(config)(x, torch.arange(LENGTH)[None]), mask)[0]

    return function, ours


@pytest.mark.parametrize("paradigm", list(Paradigm))
@pytest.mark.parametrize("kind", KINDS)
def test_whole_and_split_outputs_and_gradients_match_transformers(kind, paradigm):
    theirs, ours = layers(kind)
    x, dy = torch.randn(2, 2, LENGTH, D_MODEL, dtype=torch.float64)

    def in_pieces(x):
        state, outputs = None, []
        for start, stop in pairwise([0, 12, 13, 20, LENGTH]):
            y, state = ours(x[:, start:stop], state, paradigm=paradigm, return_state=True)
            outputs.append(y)
        return torch.cat(outputs, dim=1)

    results = []
    for function in (theirs, lambda x: ours(x, paradigm=paradigm)[0], in_pieces):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.backward(dy)
        results.append((y, leaf.grad))
    agree(results[1], results[0])
    agree(results[2], results[0])
