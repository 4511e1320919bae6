"""Hybrid decoders of transformers, which alternate attention with other mixers; some have mixtures of experts."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...blocks import Block
from ...models import LanguageModel
from .architecture import Layout
from .fields import Table, head_size, only, same, width
from .fla import convolutions, projections
from .layout import Part, part
from .llama import HEADS, MODEL, ROPE, SILU, SWIGLU, Rotating, attention, norms, rotary_rows, swiglu
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


def experts(prefix: str, ffn: Any, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Layout:
    """Return the layout of a mixture of experts.

    The library has one tensor per expert and product; seqmix stacks them, transposed.

    Args:
        prefix: prefix of the library's tensor names.
        ffn: the block's mixture of experts.
        names: the library's names of an expert's gate, up and down projection.
    """
    layout: Layout = {}
    for ours, name in zip(("gate_proj", "up_proj", "down_proj"), names, strict=True):
        n, d_in, d_out = getattr(ffn, ours).weight.shape
        layout[f"ffn.{ours}.weight"] = tuple(
            part(f"{prefix}.experts.{e}.{name}.weight", d_out, d_in, pattern="o i -> 1 i o") for e in range(n)
        )
    return layout | {"ffn.router.weight": f"{prefix}.gate.weight"}


class Qwen3Next(Rotating):
    """Qwen3-Next: Gated DeltaNet and gated attention with partial rotation, zero-centered norms, and experts with a
    gated shared expert."""

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
                {"ffn.kind": "moe", "ffn.score_function": "softmax", "ffn.shared_gate": True, "ffn.routed_scale": 1.0},
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
    ignored_fields = "decoder_sparse_step full_attention_interval mlp_only_layers intermediate_size num_experts "
    ignored_fields += "use_sliding_window"
    ignored_tensors = r".*inv_freq|mtp\..*"  # mtp: the layers of multi-token prediction

    def expand_fields(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        fields = super().expand_fields(values, where)
        n = values.get("num_hidden_layers", 0)
        if not fields.get("layer_types"):
            interval = values.get("full_attention_interval", 4)
            fields["layer_types"] = [LINEAR if (i + 1) % interval else FULL for i in range(n)]
        step = values.get("decoder_sparse_step", 1)
        dense = values.get("mlp_only_layers") or []
        sparse = [bool(values.get("num_experts")) and i not in dense and (i + 1) % step == 0 for i in range(n)]
        return fields | {"networks": ["sparse" if is_sparse else "dense" for is_sparse in sparse]}

    def collapse_fields(self, values: dict[str, Any]) -> dict[str, Any]:
        dense = [i for i, kind in enumerate(values.pop("networks")) if kind == "dense"]
        return super().collapse_fields(values) | {"mlp_only_layers": dense, "decoder_sparse_step": 1}

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        ffn: Any = block.ffn
        layout = norms() | (self.attention(mixer) if mixer.kind == "attention" else self.delta(mixer))
        if block.ffn is None or not hasattr(ffn, "router"):
            return layout | swiglu("mlp")
        shared: Layout = {"ffn.shared_gate.weight": "mlp.shared_expert_gate.weight", "ffn.bias": ()}
        return layout | experts("mlp", ffn) | swiglu("mlp.shared_expert", "ffn.shared") | shared

    def attention(self, mixer: Any) -> Layout:
        """Return the layout of attention.

        Queries and gates are one tensor, which has, for each head, the rows of its query and then those of its gate.
        """
        heads = mixer.n_heads
        groups = mixer.n_kv_heads
        size = mixer.head_dim
        d_model = mixer.in_proj.in_features
        queries_and_gates = ("self_attn.q_proj.weight", 2 * heads * size, d_model)
        keys = ("self_attn.k_proj.weight", groups * size, d_model)
        return {
            "mixer.in_proj.weight": (
                part(*queries_and_gates, index=rotary_rows(heads, size, mixer.rotary_dim, 2 * size)),
                part(*keys, index=rotary_rows(groups, size, mixer.rotary_dim, size)),
                part("self_attn.v_proj.weight", groups * size, d_model),
                part(*queries_and_gates, pattern="(h two k) d -> two (h k) d", index=1, h=heads, two=2),
            ),
            "mixer.out_proj.weight": "self_attn.o_proj.weight",
            **{
                f"mixer.qk_norm.{name}_weight": part(
                    f"self_attn.{name}_norm.weight", size, index=rotary_rows(1, size, mixer.rotary_dim, size)
                )
                for name in "qk"
            },
        }

    def delta(self, mixer: Any) -> Layout:
        """Return the layout of Gated DeltaNet, whose projections are grouped by key head.

        For each key head, one tensor has its query, key, values and gates, and another has its write strengths and
        decays.
        """
        groups = mixer.n_qk_heads
        d_model = mixer.in_proj.in_features
        qkvz_widths = [mixer.widths[n] // groups for n in ("q", "k", "v", "gate")]
        ba_widths = [mixer.n_heads // groups] * 2
        return {
            "mixer.in_proj.weight": (
                *split_groups("linear_attn.in_proj_qkvz.weight", groups, qkvz_widths, d_model),
                *split_groups("linear_attn.in_proj_ba.weight", groups, ba_widths, d_model),
            ),
            "mixer.decay.A_log": "linear_attn.A_log",
            "mixer.decay.dt_bias": "linear_attn.dt_bias",
            "mixer.norm.weight": "linear_attn.norm.weight",
            "mixer.out_proj.weight": "linear_attn.out_proj.weight",
            **convolution(mixer, "linear_attn.conv1d"),
        }


def split_groups(name: str, groups: int, widths: list[int], d_model: int) -> Iterator[Part]:
    """Split a tensor whose rows are grouped into one part for each kind of rows.

    Args:
        name: name of the tensor.
        groups: number of groups.
        widths: number of rows of each kind in a group.
        d_model: columns of the tensor.
    """
    rows = torch.arange(groups * sum(widths))
    for kind_rows in rows.view(groups, -1).split(widths, dim=1):
        yield part(name, len(rows), d_model, index=tuple(kind_rows.flatten().tolist()))


class MiniMax(Rotating):
    """MiniMax-01: lightning and softmax attention, norms on the residual stream, and experts without load balancing."""

    name = "minimax"
    model_type = "minimax"
    class_name = "MiniMaxForCausalLM"
    common = MODEL | Table(
        {"ffn.kind": "moe", "ffn.score_function": "softmax", "ffn.routed_scale": 1.0, "block.norm_placement": "stream"},
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
    ignored_fields = "block_size router_jitter_noise"
    ignored_tensors = r".*(inv_freq|slope_rate|(query|key|diagonal)_decay)"

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        layout = norms() | experts("block_sparse_moe", block.ffn, ("w1", "w3", "w2")) | {"ffn.bias": ()}
        if mixer.kind == "attention":
            return layout | attention(mixer)
        return layout | self.lightning(mixer)

    def lightning(self, mixer: Any) -> Layout:
        """Return the layout of lightning attention, whose rows are grouped by head: its query, key and value."""
        rows = [mixer.key_dim, mixer.key_dim, mixer.value_dim]
        d_model = mixer.in_proj.in_features
        gate = mixer.widths["gate"]
        return {
            "mixer.in_proj.weight": (
                *split_groups("self_attn.qkv_proj.weight", mixer.n_heads, rows, d_model),
                part("self_attn.output_gate.weight", gate, d_model),
            ),
            "mixer.norm.weight": "self_attn.norm.weight",
            "mixer.out_proj.weight": "self_attn.out_proj.weight",
        }

    def computed_tensors(self, model: LanguageModel) -> dict[str, Tensor]:
        tensors = {}
        for i, block in enumerate(model.blocks):
            mixer: Any = block.mixer
            if mixer.kind == "lightning":
                decays = minimax_decays(mixer.n_heads, i, len(model.blocks))
                tensors |= {f"{self.layers}.{i}.self_attn.{name}": x for name, x in decays.items()}
        return tensors


def minimax_decays(heads: int, layer: int, layers: int, size: int = 256) -> dict[str, Tensor]:
    """Compute the decay buffers of a lightning layer of MiniMax, for blocks of `size` tokens (256 by default)."""
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
    """OLMo Hybrid: Gated DeltaNet with norms at the branches' inputs, and attention with norms at their outputs."""

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
    ignored_fields = "linear_a_log_max linear_a_log_min linear_dt_init_floor linear_dt_max linear_dt_min"
    aliases: ClassVar = {
        ".input_layernorm.": ".attention_layer_norm.",
        ".post_attention_layernorm.": ".feedforward_layer_norm.",
    }

    def expand_fields(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        fields = super().expand_fields(values, where)
        return fields | {"positions": "none" if fields.get("rope_theta") is None else "rope"}

    def collapse_fields(self, values: dict[str, Any]) -> dict[str, Any]:
        if values.pop("positions", "rope") == "none":
            del values["rope_theta"]
        return super().collapse_fields(values)

    def file_tensors(self, theirs: Mapping[str, Tensor], model: LanguageModel) -> Mapping[str, Tensor]:
        # transformers joins the convolutions of q, k and v, and saves the result as three equal parts
        tensors = dict(theirs)
        for i, block in enumerate(model.blocks):
            widths = getattr(block.mixer, "widths", {})
            names = [f"{self.layers}.{i}.linear_attn.{name}_conv1d.weight" for name in "qkv"]
            if block.mixer.kind == "gated_delta_net" and all(name in theirs for name in names):
                joined = torch.cat([theirs[name] for name in names])
                sizes = [widths[name] for name in "qkv"]
                if len(joined) == sum(sizes):
                    tensors |= zip(names, joined.split(sizes), strict=True)
        return tensors

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        if mixer.kind == "attention":
            heads = {"q": mixer.n_heads, "k": mixer.n_kv_heads}
            qk_norms: Layout = {
                f"mixer.qk_norm.{name}_weight": part(
                    f"self_attn.{name}_norm.weight", n * mixer.head_dim, pattern="(h pair k) -> h (k pair)", h=n, pair=2
                )
                for name, n in heads.items()
            }
            block_norms = norms("feedforward_layer_norm", "post_feedforward_layernorm")
            return block_norms | swiglu("mlp") | attention(mixer) | qk_norms
        layout: Layout = {
            "mixer.in_proj.weight": projections(mixer, "linear_attn"),
            "mixer.decay.A_log": "linear_attn.A_log",
            "mixer.decay.dt_bias": "linear_attn.dt_bias",
            "mixer.norm.weight": "linear_attn.o_norm.weight",
            "mixer.out_proj.weight": "linear_attn.o_proj.weight",
        }
        block_norms = norms("attention_layer_norm", "feedforward_layer_norm")
        return block_norms | swiglu("mlp") | layout | convolutions(mixer, "linear_attn")
