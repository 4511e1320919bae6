"""Kimi Linear of transformers: KDA and latent attention without positions; later layers have mixtures of experts."""

from typing import Any, ClassVar

from ...blocks import Block
from .architecture import Architecture, Layout
from .fields import Table, head_size, only, same, width
from .fla import convolutions, projections
from .hybrids import FULL, LINEAR, experts
from .layout import part
from .llama import MODEL, SILU, SWIGLU, norms, swiglu

KDA = Table(
    {"mixer.kind": "kda", "mixer.gate": "sigmoid", "mixer.gate_bias": False},
    {
        "rms_norm_eps": same("norm.eps", "mixer.norm_eps", default=1e-5),
        "linear_num_heads": "mixer.n_heads",
        "linear_head_dim": head_size("mixer.expand_k", "mixer.expand_v", heads="linear_num_heads"),
        "linear_conv_kernel_dim": "mixer.short_conv",
    },
)
LATENT = Table(
    {"mixer.kind": "latent_attention", "mixer.positions": "none", "mixer.norm_eps": 1e-6},
    {
        "num_key_value_heads": same("mixer.n_heads", default=lambda theirs: theirs["num_attention_heads"]),
        "num_attention_heads": "mixer.n_heads",
        "q_lora_rank": same("mixer.q_lora_rank", default=None),
        **{name: f"mixer.{name}" for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    },
)
EXPERTS = Table(
    {"ffn.kind": "moe", "ffn.score_function": "sigmoid", "ffn.shared_gate": False},
    {
        "num_experts": "ffn.n_experts",
        "num_experts_per_token": "ffn.top_k",
        "moe_intermediate_size": width("ffn.expansion"),
        "num_shared_experts": same(
            "ffn.shared_expansion",
            read=lambda n, theirs: n * theirs["moe_intermediate_size"] / theirs["hidden_size"],
            write=lambda shared, ours: round(shared / ours["ffn.expansion"]),
        ),
        "routed_scaling_factor": "ffn.routed_scale",
        "hidden_act": SILU,
        "moe_renormalize": only(True),
        "num_expert_group": only(1),
        "topk_group": only(1),
    },
)


class KimiLinear(Architecture):
    """Kimi Linear of transformers."""

    name = "kimi-linear"
    model_type = "kimi_linear"
    class_name = "KimiLinearForCausalLM"
    common = MODEL | Table({}, {"attention_bias": only(False)})
    kinds: ClassVar = {
        "layer_types": {FULL: LATENT, LINEAR: KDA},
        "mlp_layer_types": {"dense": SWIGLU, "sparse": EXPERTS},
    }
    ignored_fields = "head_dim qk_head_dim"
    aliases: ClassVar = {".mlp.": ".block_sparse_moe."}

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        ffn: Any = block.ffn
        layout = norms() | (self.latent(mixer) if mixer.kind == "latent_attention" else self.kda(mixer))
        if not hasattr(ffn, "router"):
            return layout | swiglu("block_sparse_moe")
        shared = swiglu("block_sparse_moe.shared_experts", "ffn.shared") if ffn.shared is not None else {}
        bias: Layout = {"ffn.bias": "block_sparse_moe.gate.e_score_correction_bias"}
        return layout | experts("block_sparse_moe", ffn, ("w1", "w3", "w2")) | shared | bias

    def latent(self, mixer: Any) -> Layout:
        """Return the layout of latent attention."""
        d_model = mixer.in_proj.in_features
        widths = mixer.widths
        has_low_rank_queries = mixer.q_up is not None
        queries = part(f"self_attn.q_{'a_' if has_low_rank_queries else ''}proj.weight", widths["q"], d_model)
        latents = part("self_attn.kv_a_proj_with_mqa.weight", widths["latent"] + widths["rotary"], d_model)
        layout: Layout = {}
        if has_low_rank_queries:
            layout["mixer.q_norm.weight"] = "self_attn.q_a_layernorm.weight"
            layout["mixer.q_up.weight"] = "self_attn.q_b_proj.weight"
        return layout | {
            "mixer.in_proj.weight": (queries, latents),
            "mixer.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
            "mixer.kv_up.weight": "self_attn.kv_b_proj.weight",
            "mixer.out_proj.weight": "self_attn.o_proj.weight",
        }

    def kda(self, mixer: Any) -> Layout:
        """Return the layout of KDA."""
        heads, size = mixer.decay.dt_bias.shape
        names = {"decay_proj.down": "f_a_proj", "decay_proj.up": "f_b_proj", "gate_proj.down": "g_a_proj"}
        names |= {"gate_proj.up": "g_b_proj", "norm": "o_norm", "out_proj": "o_proj"}
        layout: Layout = {f"mixer.{ours}.weight": f"self_attn.{theirs}.weight" for ours, theirs in names.items()}
        return layout | {
            "mixer.in_proj.weight": projections(mixer, "self_attn"),
            "mixer.decay.A_log": part("self_attn.A_log", 1, 1, heads, 1, pattern="a b h c -> (a b h c)"),
            "mixer.decay.dt_bias": part("self_attn.dt_bias", heads * size, pattern="(h k) -> h k", h=heads),
            **convolutions(mixer, "self_attn"),
        }
