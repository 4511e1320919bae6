"""Decoders of transformers that mix layers of attention with layers of another kind, some with mixtures of experts."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..blocks import Block
from ..models import LanguageModel
from .architecture import Layout
from .fields import Table, head_size, only, same, width
from .fla import convolutions, projections
from .layout import Part, part
from .llama import HEADS, MODEL, ROPE, SILU, SWIGLU, Rotating, attention, norms, swiglu, turned_rows
from .mamba import convolution

FULL = "full_attention"
LINEAR = "linear_attention"
KINDS = ("full_attn", "linear_attn", "mlp")
NORM_EPS = {"rms_norm_eps": same("norm.eps", "mixer.norm_eps", default=1e-6)}
ATTENTION = HEADS | ROPE
DELTA = Table(
    {"mixer.kind": "gated_delta_net"},
    {
        "linear_num_value_heads": "mixer.n_heads",
        "linear_num_key_heads": "mixer.n_qk_heads",
        "linear_key_head_dim": head_size("mixer.expand_k", heads="linear_num_key_heads", of="mixer.n_qk_heads"),
        "linear_value_head_dim": head_size("mixer.expand_v", heads="linear_num_value_heads"),
        "linear_conv_kernel_dim": "mixer.short_conv",
    },
)


def experts_of(theirs: str, mixer: Any, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Layout:
    """Experts, each a tensor of theirs per product, transposed here."""
    layout: Layout = {}
    for ours, name in zip(("gate_proj", "up_proj", "down_proj"), names, strict=True):
        n, d_in, d_out = getattr(mixer, ours).weight.shape
        layout[f"ffn.{ours}.weight"] = tuple(
            part(f"{theirs}.experts.{e}.{name}.weight", d_out, d_in, pattern="o i -> 1 i o") for e in range(n)
        )
    return layout | {"ffn.router.weight": f"{theirs}.gate.weight"}


class Qwen3Next(Rotating):
    """Gated DeltaNet and gated attention, partly turned; zero-centered norms; experts with a gated shared one."""

    name = "qwen3-next"
    model_type = "qwen3_next"
    class_name = "Qwen3NextForCausalLM"
    common = MODEL | Table({"norm.zero_centered": True}, {**NORM_EPS, "attention_bias": only(False)})
    kinds: ClassVar = {
        "layer_types": {
            FULL: ATTENTION
            | Table(
                {"mixer.qk_norm": "rms_zero_centered", "mixer.gate": "sigmoid"},
                {"partial_rotary_factor": same("mixer.partial_rotary_factor", default=0.25)},
            ),
            LINEAR: DELTA,
        },
        "networks": {
            "dense": SWIGLU,
            "sparse": Table(
                {"ffn.kind": "moe", "ffn.scores": "softmax", "ffn.shared_gate": True, "ffn.routed_scale": 1.0},
                {
                    "num_experts": "ffn.n_experts",
                    "num_experts_per_tok": "ffn.top_k",
                    "moe_intermediate_size": width("ffn.expansion"),
                    "shared_expert_intermediate_size": width("ffn.shared_expansion"),
                    "hidden_act": SILU,
                    "norm_topk_prob": only(True),
                },
            ),
        },
    }
    harmless = "decoder_sparse_step full_attention_interval mlp_only_layers intermediate_size num_experts "
    harmless += "use_sliding_window"
    unread = r".*inv_freq|mtp\..*"  # layers that predict further tokens

    def unfolded(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        found = super().unfolded(values, where)
        n = values.get("num_hidden_layers", 0)
        if not found.get("layer_types"):
            interval = values.get("full_attention_interval", 4)
            found["layer_types"] = [LINEAR if (i + 1) % interval else FULL for i in range(n)]
        step = values.get("decoder_sparse_step", 1)
        dense = values.get("mlp_only_layers") or []
        sparse = [bool(values.get("num_experts")) and i not in dense and (i + 1) % step == 0 for i in range(n)]
        return found | {"networks": ["sparse" if each else "dense" for each in sparse]}

    def folded(self, values: dict[str, Any]) -> dict[str, Any]:
        dense = [i for i, kind in enumerate(values.pop("networks")) if kind == "dense"]
        return super().folded(values) | {"mlp_only_layers": dense, "decoder_sparse_step": 1}

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        ffn: Any = block.ffn
        layout = norms() | (self.attention(mixer) if mixer.kind == "attention" else self.delta(mixer))
        if block.ffn is None or not hasattr(ffn, "router"):
            return layout | swiglu("mlp")
        shared: Layout = {"ffn.shared_gate.weight": "mlp.shared_expert_gate.weight", "ffn.bias": ()}
        return layout | experts_of("mlp", ffn) | swiglu("mlp.shared_expert", "ffn.shared") | shared

    def attention(self, mixer: Any) -> Layout:
        """Attention, whose queries and gates are one tensor: by head, a query and then its gate."""
        heads = mixer.n_heads
        groups = mixer.n_kv_heads
        size = mixer.head_dim
        d_model = mixer.in_proj.in_features
        both = ("self_attn.q_proj.weight", 2 * heads * size, d_model)
        keys = ("self_attn.k_proj.weight", groups * size, d_model)
        return {
            "mixer.in_proj.weight": (
                part(*both, index=turned_rows(heads, size, mixer.rotary_dim, 2 * size)),
                part(*keys, index=turned_rows(groups, size, mixer.rotary_dim, size)),
                part("self_attn.v_proj.weight", groups * size, d_model),
                part(*both, pattern="(h two k) d -> two (h k) d", index=1, h=heads, two=2),
            ),
            "mixer.out_proj.weight": "self_attn.o_proj.weight",
            **{
                f"mixer.qk_norm.{name}_weight": part(
                    f"self_attn.{name}_norm.weight", size, index=turned_rows(1, size, mixer.rotary_dim, size)
                )
                for name in "qk"
            },
        }

    def delta(self, mixer: Any) -> Layout:
        """Gated DeltaNet, whose rows are by head of keys: its query, key, values and gates; and its rates and steps."""
        groups = mixer.n_qk_heads
        d_model = mixer.in_proj.in_features
        big = [mixer.widths[n] // groups for n in ("q", "k", "v", "gate")]
        small = [mixer.n_heads // groups] * 2
        return {
            "mixer.in_proj.weight": (
                *by_group("linear_attn.in_proj_qkvz.weight", groups, big, d_model),
                *by_group("linear_attn.in_proj_ba.weight", groups, small, d_model),
            ),
            "mixer.decay.A_log": "linear_attn.A_log",
            "mixer.decay.dt_bias": "linear_attn.dt_bias",
            "mixer.norm.weight": "linear_attn.norm.weight",
            "mixer.out_proj.weight": "linear_attn.out_proj.weight",
            **convolution(mixer, "linear_attn.conv1d"),
        }


def by_group(name: str, groups: int, widths: list[int], d_model: int) -> Iterator[Part]:
    """What a tensor has for each group of rows one after another, as one tensor each."""
    rows = torch.arange(groups * sum(widths))
    for each in rows.view(groups, -1).split(widths, dim=1):
        yield part(name, len(rows), d_model, index=tuple(each.flatten().tolist()))


class MiniMax(Rotating):
    """MiniMax-01: lightning and softmax attention, norms on the stream, experts without balance."""

    name = "minimax"
    model_type = "minimax"
    class_name = "MiniMaxForCausalLM"
    common = MODEL | Table(
        {"ffn.kind": "moe", "ffn.scores": "softmax", "ffn.routed_scale": 1.0, "block.norm_placement": "stream"},
        {
            "num_local_experts": "ffn.n_experts",
            "num_experts_per_tok": "ffn.top_k",
            "intermediate_size": width("ffn.expansion"),
            "hidden_act": SILU,
            **{f"{kind}_{which}_factor": only(1, 1.0) for kind in KINDS for which in ("alpha", "beta")},
        },
    )
    kinds: ClassVar = {
        "layer_types": {
            FULL: ATTENTION | Table({}, {"sliding_window": same("mixer.window", default=None)}),
            LINEAR: Table(
                {"mixer.kind": "lightning", "mixer.schedule": "minimax"},
                {
                    "num_attention_heads": "mixer.n_heads",
                    "rms_norm_eps": same("norm.eps", default=1e-6),
                    "head_dim": head_size(
                        *("mixer.expand_k", "mixer.expand_v"),
                        heads="num_attention_heads",
                        default=lambda theirs: theirs["hidden_size"] // theirs["num_attention_heads"],
                    ),
                },
            ),
        }
    }
    harmless = "block_size router_jitter_noise"
    unread = r".*(inv_freq|slope_rate|(query|key|diagonal)_decay)"

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        layout = norms() | experts_of("block_sparse_moe", block.ffn, ("w1", "w3", "w2")) | {"ffn.bias": ()}
        if mixer.kind == "attention":
            return layout | attention(mixer)
        return layout | self.lightning(mixer)

    def lightning(self, mixer: Any) -> Layout:
        """Lightning attention, whose rows are by head: its query, key and values."""
        rows = [mixer.key_dim, mixer.key_dim, mixer.value_dim]
        d_model = mixer.in_proj.in_features
        gate = mixer.widths["gate"]
        return {
            "mixer.in_proj.weight": (
                *by_group("self_attn.qkv_proj.weight", mixer.n_heads, rows, d_model),
                part("self_attn.output_gate.weight", gate, d_model),
            ),
            "mixer.norm.weight": "self_attn.norm.weight",
            "mixer.out_proj.weight": "self_attn.out_proj.weight",
        }

    def derived(self, model: LanguageModel) -> dict[str, Tensor]:
        found = {}
        for i, block in enumerate(model.blocks):
            mixer: Any = block.mixer
            if mixer.kind == "lightning":
                own = minimax_decays(mixer.n_heads, i, len(model.blocks))
                found |= {f"{self.layers}.{i}.self_attn.{name}": x for name, x in own.items()}
        return found


def minimax_decays(heads: int, layer: int, layers: int, size: int = 256) -> dict[str, Tensor]:
    """Its decays of a layer inside blocks of its default size."""
    slopes = (1 / (2 ** (8 / heads))) ** (torch.arange(heads) + 1) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)
    slopes = slopes[:, None, None]
    n = torch.arange(size) + 1
    distance = slopes * (n[:, None] - n)[None, None]
    return {
        "slope_rate": slopes,
        "query_decay": torch.exp(-slopes * n[:, None]),
        "key_decay": torch.exp(-slopes * (size - n[:, None])),
        "diagonal_decay": torch.exp(torch.where(distance >= 0, -distance, float("-inf"))),
    }


class OlmoHybrid(Rotating):
    """OLMo Hybrid: Gated DeltaNet, and attention whose norms are on the branches' outputs."""

    name = "olmo-hybrid"
    model_type = "olmo_hybrid"
    class_name = "OlmoHybridForCausalLM"
    common = MODEL | SWIGLU | Table({}, {"attention_bias": only(False)})
    kinds: ClassVar = {
        "layer_types": {
            FULL: ATTENTION
            | Table(
                {"mixer.qk_norm": "rms_all_heads", "block.norm_placement": "output"},
                {**NORM_EPS, "positions": "mixer.positions"},
            ),
            LINEAR: DELTA
            | Table(
                {"mixer.norm_eps": 1e-5, "block.norm_placement": "input"},
                {"linear_allow_neg_eigval": same("mixer.allow_neg_eigval", default=True)},
            ),
        }
    }
    harmless = "linear_a_log_max linear_a_log_min linear_dt_init_floor linear_dt_max linear_dt_min"
    aliases: ClassVar = {
        ".input_layernorm.": ".attention_layer_norm.",
        ".post_attention_layernorm.": ".feedforward_layer_norm.",
    }

    def unfolded(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        found = super().unfolded(values, where)
        return found | {"positions": "none" if found.get("rope_theta") is None else "rope"}

    def folded(self, values: dict[str, Any]) -> dict[str, Any]:
        if values.pop("positions", "rope") == "none":
            del values["rope_theta"]
        return super().folded(values)

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        if mixer.kind == "attention":
            shapes = {"q": mixer.n_heads, "k": mixer.n_kv_heads}
            weights: Layout = {
                f"mixer.qk_norm.{name}_weight": part(
                    f"self_attn.{name}_norm.weight", n * mixer.head_dim, pattern="(h pair k) -> h (k pair)", h=n, pair=2
                )
                for name, n in shapes.items()
            }
            placed = norms("feedforward_layer_norm", "post_feedforward_layernorm")
            return placed | swiglu("mlp") | attention(mixer) | weights
        layout: Layout = {
            "mixer.in_proj.weight": projections(mixer, "linear_attn"),
            "mixer.decay.A_log": "linear_attn.A_log",
            "mixer.decay.dt_bias": "linear_attn.dt_bias",
            "mixer.norm.weight": "linear_attn.o_norm.weight",
            "mixer.out_proj.weight": "linear_attn.o_proj.weight",
        }
        placed = norms("attention_layer_norm", "feedforward_layer_norm")
        return placed | swiglu("mlp") | layout | convolutions(mixer, "linear_attn")
