"""Converted models of transformers (5.24): equal logits in every paradigm, and a bitwise equal export."""

import json
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import unwrap
from types import FunctionType

import pytest
import torch
from peers.converted import VOCAB, compare, computing_in, moved

from seqmix.interop.convert.fields import IGNORED_FIELDS

# not importorskip: it would also skip where transformers is installed and its import fails
if find_spec("transformers") is None:
    pytest.skip("needs pip install transformers", allow_module_level=True)

import transformers
from transformers import AutoModelForCausalLM

COMMON = {"hidden_size": 24, "vocab_size": VOCAB, "num_hidden_layers": 2, "initializer_range": 0.3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
THREE = ["linear_attention", "full_attention", "linear_attention"]
WIDE = {"intermediate_size": 40, "num_attention_heads": 4}
LATENT = {
    **{"mlp_layer_types": ["dense", "sparse"], "num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 2},
    **{"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "num_attention_heads": 4},
    **{"linear_num_heads": 2, "linear_head_dim": 8, "moe_intermediate_size": 20, "num_key_value_heads": 4},
}
LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 10, "linear_value_head_dim": 5}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GRIFFIN = {
    **{"num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 40},
    **{"attention_window_size": 7, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}, "logits_soft_cap": 5.0},
}
WIDE_VALUES = "olmo-hybrid, wide values"
JAMBA = {
    **{"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1, "intermediate_size": 40},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_d_state": 5, "mamba_dt_rank": 3},
}
NO_EXPERTS = {"expert_layer_period": 6, "expert_layer_offset": 5}
CASES = {
    "qwen3-next": (
        "Qwen3Next",
        HEADS
        | LAYERS
        | DELTA
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "mlp_only_layers": [0]}
        | {"shared_expert_intermediate_size": 16, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    ),
    "minimax": ("MiniMax", HEADS | LAYERS | {"num_local_experts": 4, "num_hidden_layers": 3, "layer_types": THREE}),
    "olmo-hybrid": (
        "OlmoHybrid",
        TOKENS | LAYERS | DELTA | {"num_attention_heads": 4, "num_key_value_heads": 2} | WIDE,
    ),
    "olmo-hybrid, no positions": (
        "OlmoHybrid",
        TOKENS
        | LAYERS
        | DELTA
        | {"num_attention_heads": 4, "rope_parameters": None, "tie_word_embeddings": True}
        | WIDE,
    ),
    WIDE_VALUES: (
        "OlmoHybrid",
        TOKENS | LAYERS | DELTA | {"num_attention_heads": 4, "linear_value_head_dim": 7} | WIDE,
    ),
    "jamba": (
        "Jamba",
        JAMBA | {"num_experts": 4, "mamba_expand": 2, "expert_layer_period": 3, "expert_layer_offset": 1},
    ),
    "jamba, dense": ("Jamba", JAMBA | {"num_experts": 1, "tie_word_embeddings": True} | NO_EXPERTS),
    "kimi-linear": ("KimiLinear", TOKENS | LAYERS | LATENT | WIDE),
    "kimi-linear, low rank": ("KimiLinear", TOKENS | LAYERS | LATENT | WIDE | {"q_lora_rank": 7}),
    "llama": ("Llama", HEADS),
    "llama, tied": ("Llama", HEADS | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama, biases": ("Llama", HEADS | {"attention_bias": True, "mlp_bias": True}),
    "llama, stretched": ("Llama", HEADS | {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "llama, 3.1": ("Llama", HEADS | {"head_dim": 16, "rope_parameters": ROPE | LLAMA3}),
    "qwen2": ("Qwen2", HEADS | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "recurrent-gemma": ("RecurrentGemma", TOKENS | GRIFFIN),
    "recurrent-gemma, biases": ("RecurrentGemma", TOKENS | GRIFFIN | {"attention_bias": True, "lru_width": 36}),
    "rwkv4": ("Rwkv", {"intermediate_size": 40, "attention_hidden_size": 36}),
    "rwkv4, tied": ("Rwkv", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", HEADS | {"sliding_window": 7}),
    "mamba2": ("Mamba2", {"num_heads": 4, "head_dim": 12, "state_size": 6, "n_groups": 2, "chunk_size": 8}),
    "mamba2, limited": (
        "Mamba2",
        {"num_heads": 4, "head_dim": 12, "state_size": 6, "n_groups": 1, "time_step_limit": (0.1, 0.8)},
    ),
    "mamba": ("Mamba", {"state_size": 5, "time_step_rank": 2, "intermediate_size": 48}),
    "qwen3": ("Qwen3", HEADS | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
}


def model_of(case, dtype):
    """Their model, moved; of float64 all that they compute in float32 whatever the dtype is float64 too."""
    kind, fields = CASES[case]
    eps = "layer_norm_epsilon" if kind.startswith("Mamba") else "rms_norm_eps"
    further = {} if kind == "Rwkv" else {eps: 1e-3}  # no default
    config = getattr(transformers, f"{kind}Config")(**COMMON | further | fields)
    torch.manual_seed(0)
    with computing_in(dtype):
        return moved(AutoModelForCausalLM.from_config(config, dtype=dtype, **PLAIN))


PLAIN = {"experts_implementation": "eager"}  # others know no float64


@contextmanager
def without_kernels(model):
    """Beside fla some modules call its kernels, which need a GPU."""
    module = sys.modules[type(model).__module__]
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(module, "RecurrentGemmaRglru"):  # which adds in float32 whatever the dtype
            patch.setattr(module.RecurrentGemmaRglru._rnn_scan, "__defaults__", (model.dtype,))
        for name, function in vars(module).copy().items():
            if isinstance(function, FunctionType) and "delta" in name:
                patch.setattr(module, name, unwrap(function))
        yield


def measured(case, dtype, folder):
    """What `compare` finds, and their configuration."""
    theirs = model_of(case, dtype)
    theirs.save_pretrained(folder / "theirs")

    @torch.no_grad()
    def reference(tokens):
        with computing_in(dtype), without_kernels(theirs):
            return theirs(tokens, use_cache=False).logits

    return compare(folder / "theirs", folder, case.partition(",")[0], reference, dtype), theirs.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_logits_match_in_every_paradigm_and_export_restores_the_weights(case, dtype, tmp_path):
    result, config = measured(case, dtype, tmp_path)
    # the slopes of MiniMax divide by L - 1 + 1e-5 there
    exact = 5e-5 if case == "minimax" else 1e-9
    assert max(result.worst.values()) < (1e-4 if dtype == torch.float32 else exact)
    # its buffers are of float32 in any file of its own
    reshaped = ("conv1d.weight",) if case == WIDE_VALUES else ()  # see the test below
    reshaped += ("decay", "rate") if dtype == torch.float64 else ()
    assert [name for name in result.changed if not name.endswith(reshaped)] == []
    again, wanted = type(config).from_pretrained(tmp_path / "back").to_dict(), config.to_dict()
    assert function_of({name: again.get(name) for name in wanted}) == function_of(wanted)


def test_convolution_saved_in_equal_parts_is_exported_with_uneven_widths(tmp_path):
    theirs = model_of(WIDE_VALUES, torch.float32)
    result, _ = measured(WIDE_VALUES, torch.float32, tmp_path)
    assert len(result.changed) == 3  # transformers wrote three thirds
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", config=theirs.config, **PLAIN).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again[name], tensor), name


def function_of(config):
    """What matters of a configuration, as JSON has it."""
    config = {k: v for k, v in config.items() if k not in IGNORED_FIELDS.split()}
    return json.loads(json.dumps({k: v for k, v in config.items() if k not in STARTS}))


STARTS = {"dtype", "initializer_range", "architectures", "chunk_size"}
