"""Jamba of transformers: Mamba with inner norms, attention without positions, and some layers with experts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ...blocks import Block
from .architecture import Architecture, Layout
from .fields import Table, only, same, width
from .hybrids import FULL, LINEAR, experts
from .layout import part
from .llama import BASE, SILU, SWIGLU, attention, norms, swiglu
from .mamba import convolution, integer_or_float

MAMBA = Table(
    {"mixer.kind": "mamba", "mixer.inner_norm": "rms"},
    {
        "mamba_d_state": same("mixer.d_state", default=16),
        "mamba_d_conv": same("mixer.short_conv", default=4),
        "mamba_expand": same("mixer.expand", default=2, write=integer_or_float),
        "mamba_dt_rank": same(
            "mixer.dt_rank",
            default="auto",
            read=lambda rank, theirs: math.ceil(theirs["hidden_size"] / 16) if rank == "auto" else rank,
            write=lambda rank, ours: rank or math.ceil(ours["d_model"] / 16),
        ),
        "mamba_conv_bias": only(True),
        "mamba_proj_bias": only(False),
        "mamba_inner_layernorms": only(True),
    },
)
ATTENTION = Table(
    {"mixer.kind": "attention", "mixer.positions": "none"},
    {
        "num_attention_heads": "mixer.n_heads",
        "num_key_value_heads": same("mixer.n_kv_heads", default=lambda theirs: theirs["num_attention_heads"]),
    },
)
EXPERTS = Table(
    {
        "ffn.kind": "moe",
        "ffn.score_function": "softmax",
        "ffn.renormalize": False,
        "ffn.routed_scale": 1.0,
        "ffn.shared_expansion": 0.0,
    },
    {
        "num_experts": "ffn.n_experts",
        "num_experts_per_tok": same("ffn.top_k", default=2),
        "intermediate_size": width("ffn.expansion"),
        "hidden_act": SILU,
    },
)
PERIODS = {"layer_types": ("attn", 8, 4, FULL), "networks": ("expert", 2, 1, "sparse")}
"""By list with one entry per layer: prefix of the fields that it is computed from, their defaults (period and offset),
and the entry of layers whose number, modulo the period, is the offset."""


class Jamba(Architecture):
    """Jamba of transformers."""

    name = "jamba"
    model_type = "jamba"
    class_name = "JambaForCausalLM"
    common = BASE | Table({}, {"rms_norm_eps": same("norm.eps", "mixer.norm_eps", default=1e-6)})
    kinds: ClassVar = {
        "layer_types": {FULL: ATTENTION, LINEAR: MAMBA},
        "networks": {"dense": SWIGLU, "sparse": EXPERTS},
    }
    ignored_fields = "use_mamba_kernels use_mambapy use_associative_scan num_experts num_experts_per_tok sliding_window"
    ignored_fields += " calc_logits_for_entire_prompt num_logits_to_keep attn_layer_period attn_layer_offset"
    ignored_fields += " expert_layer_period expert_layer_offset"
    norm = "model.final_layernorm.weight"
    unchanged = "A_log D in_proj.weight x_proj.weight dt_proj.weight dt_proj.bias out_proj.weight"
    """Tensors of Mamba with the same name in seqmix."""

    def expand_fields(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        fields = super().expand_fields(values, where)
        n = values.get("num_hidden_layers", 0)
        others = {"layer_types": LINEAR, "networks": "dense"}
        for name, (prefix, default_period, default_offset, kind) in PERIODS.items():
            period = values.get(f"{prefix}_layer_period", default_period)
            offset = values.get(f"{prefix}_layer_offset", default_offset)
            fields[name] = [kind if i % period == offset else others[name] for i in range(n)]
        if values.get("num_experts", 16) == 1:
            fields["networks"] = ["dense"] * n
        return fields

    def collapse_fields(self, values: dict[str, Any]) -> dict[str, Any]:
        fields = super().collapse_fields({"num_experts": 1, **values})
        for name, (prefix, *_, kind) in PERIODS.items():
            period, offset = period_of(fields.pop(name), kind)
            fields |= {f"{prefix}_layer_period": period, f"{prefix}_layer_offset": offset}
        return fields

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        ffn: Any = block.ffn
        layout = norms(ffn="pre_ff_layernorm")
        layout |= attention(mixer) if mixer.kind == "attention" else self.mamba(mixer)
        if not hasattr(ffn, "router"):
            return layout | swiglu("feed_forward")
        router: Layout = {"ffn.router.weight": "feed_forward.router.weight", "ffn.bias": ()}
        return layout | experts("feed_forward", ffn) | router

    def mamba(self, mixer: Any) -> Layout:
        """Return the layout of Mamba and of its inner norms."""
        layout: Layout = {f"mixer.{name}": f"mamba.{name}" for name in self.unchanged.split()}
        layout |= {
            f"mixer.{ours}_norm.weight": f"mamba.{theirs}_layernorm.weight"
            for ours, theirs in (("dt", "dt"), ("k", "b"), ("q", "c"))
        }
        layout["mixer.A_log"] = part("mamba.A_log", *mixer.A_log.shape[::-1], pattern="c n -> n c")
        return layout | convolution(mixer, "mamba.conv1d")


def period_of(entries: Sequence[str], kind: str) -> tuple[int, int]:
    """Return period and offset of the layers of a kind; if there are none, an offset that no layer has."""
    numbers = [i for i, entry in enumerate(entries) if entry == kind]
    if not numbers:
        return len(entries) + 1, len(entries)
    period = numbers[1] - numbers[0] if len(numbers) > 1 else max(len(entries), numbers[0] + 1)
    return period, numbers[0]
