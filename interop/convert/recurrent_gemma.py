"""RecurrentGemma of transformers: Griffin's recurrent blocks and local attention."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ...blocks import Block
from .architecture import Joined, Layout
from .fields import Field, Table, choice, only, same, width
from .layout import part
from .llama import BASE, ROPE, Rotating, attention, norms, swiglu
from .mamba import convolution

SCALE = "embedding_scale"
"""Field of the tables that config.json lacks: transformers computes it from `hidden_size`."""
TYPES = "layer_types"
"""Field of the tables that config.json lacks: transformers computes it from `block_types`."""


class RecurrentGemma(Rotating):
    """RecurrentGemma: scaled embeddings, capped logits, zero-centered norms, and biases in networks and recurrent
    blocks."""

    name = "recurrent-gemma"
    model_type = "recurrent_gemma"
    class_name = "RecurrentGemmaForCausalLM"
    common = BASE | Table(
        {"norm.zero_centered": True, "ffn.kind": "swiglu", "ffn.activation": "gelu_tanh", "ffn.bias": True},
        {
            "rms_norm_eps": same("norm.eps", default=1e-6),
            "tie_word_embeddings": same("tie_embeddings", default=True),
            # transformers states the width of both branches together
            "intermediate_size": Field(
                ("ffn.expansion",),
                read=lambda size, theirs: size // 2 / theirs["hidden_size"],
                write=lambda expansion, ours: 2 * round(expansion * ours["d_model"]),
            ),
            "hidden_activation": only("gelu_pytorch_tanh"),
            "logits_soft_cap": same("logit_softcap", default=30.0),
            SCALE: "embedding_scale",
        },
    )
    kinds: ClassVar = {
        TYPES: {
            "recurrent": Table(
                {"mixer.kind": "rg_lru", "mixer.unit_start": True},
                {
                    "num_attention_heads": "mixer.n_heads",
                    "lru_width": width("mixer.expand", default=lambda theirs: theirs["hidden_size"]),
                    "conv1d_width": same("mixer.short_conv", default=4),
                },
            ),
            "attention": ROPE
            | Table(
                {"mixer.kind": "attention"},
                {
                    "num_attention_heads": "mixer.n_heads",
                    "num_key_value_heads": same(
                        "mixer.n_kv_heads", default=lambda theirs: theirs["num_attention_heads"]
                    ),
                    "attention_bias": choice("mixer.bias", {False: "output", True: "all"}, default=False),
                    "attention_window_size": same("mixer.window", default=2048),
                    "partial_rotary_factor": same("mixer.partial_rotary_factor", default=0.5),
                },
            ),
        }
    }
    ignored_fields = "block_types head_dim w_init_variance_scale final_w_init_variance_scale"
    norm = "model.final_norm.weight"

    def expand_fields(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        pattern = values.get("block_types") or ["recurrent", "recurrent", "attention"]
        types = [pattern[i % len(pattern)] for i in range(values.get("num_hidden_layers", 26))]
        return super().expand_fields(values, where) | {
            SCALE: bfloat16_sqrt(values.get("hidden_size", 2560)),
            TYPES: types,
        }

    def collapse_fields(self, values: dict[str, Any]) -> dict[str, Any]:
        del values[SCALE]
        return super().collapse_fields(values | {"block_types": values.pop(TYPES)})

    def block(self, block: Block) -> Layout:
        layout = norms("temporal_pre_norm", "channel_pre_norm") | swiglu("mlp_block", bias=True)
        mixer: Any = block.mixer
        if mixer.kind == "attention":
            return layout | attention(mixer, "temporal_block")
        prefix = "temporal_block"
        gates = ("recurrent_gate", "input_gate")
        heads, size, _ = mixer.gate_weight.shape
        d_model = mixer.in_proj.in_features
        width = mixer.width
        return {
            **layout,
            **convolution(mixer, f"{prefix}.conv_1d"),
            "mixer.in_proj.weight": tuple(part(f"{prefix}.linear_{name}.weight", width, d_model) for name in "xy"),
            "mixer.in_proj.bias": tuple(part(f"{prefix}.linear_{name}.bias", width) for name in "xy"),
            "mixer.gate_weight": Joined(
                tuple(part(f"{prefix}.rg_lru.{gate}_weight", heads, size, size) for gate in gates), 2
            ),
            "mixer.gate_bias": Joined(tuple(part(f"{prefix}.rg_lru.{gate}_bias", heads, size) for gate in gates), 1),
            "mixer.rate": f"{prefix}.rg_lru.recurrent_param",
            **{f"mixer.out_proj.{kind}": f"{prefix}.linear_out.{kind}" for kind in ("weight", "bias")},
        }


def bfloat16_sqrt(d_model: int) -> float:
    """Return sqrt(d_model) rounded to bfloat16, the precision in which transformers stores the embedding scale."""
    return torch.tensor(d_model**0.5, dtype=torch.bfloat16).item()
