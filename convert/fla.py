"""Models of fla (flash-linear-attention): a mixer with separate projections and convolutions, and a gated network."""

from typing import Any

from ..blocks import Block
from ..models import ModelConfig
from .architecture import Architecture, Fields, Layout
from .layout import part
from .llama import PAIRS, model_fields, swiglu, written_fields

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "g_proj", "beta": "b_proj", "dt": "a_proj"}
"""Their names of what is projected here in one product."""
LOW_RANK = {"down.weight": "0.weight", "up.weight": "1.weight", "up.bias": "1.bias"}
"""The tensors of a map of low rank with a bias."""


class Fla(Architecture):
    """What all these models share."""

    library = "fla"
    harmless = "attn_mode fuse_swiglu fuse_cross_entropy fuse_linear_cross_entropy use_l2warp"
    embedding = "model.embeddings.weight"
    norm_name = "o_norm"
    """Their norm of the output."""
    ratio = 4

    def read(self, c: Fields) -> dict[str, Any]:
        c.only(attn=None, attnres_block_size=None, hidden_act="swish", fuse_norm=True)
        d_model, eps = c.take("hidden_size"), c.take("norm_eps", 1e-6)
        norm, ratio = {"kind": "rmsnorm", "eps": eps}, c.take("hidden_ratio", self.ratio)
        width = c.take("intermediate_size", -(-int(d_model * ratio * 2 / 3) // 256) * 256)
        conv = c.take("conv_size", 4)
        mixer = {
            "kind": self.mixers[0],
            "n_heads": c.take("num_heads"),
            "short_conv": conv if c.take("use_short_conv", True) else None,
            "norm_eps": eps,
            **self.mixer_fields(c, d_model),
        }
        block = {"mixer": mixer, "ffn": {"kind": "swiglu", "expansion": width / d_model}, "norm": norm}
        return model_fields(c) | {"blocks": {self.mixers[0]: block}, "norm": norm}

    def mixer_fields(self, c: Fields, d_model: int) -> dict[str, Any]:
        """Further fields of the mixer."""
        raise NotImplementedError

    def write(self, m: ModelConfig) -> dict[str, Any]:
        block, fields = m.blocks[m.layers[0]], written_fields(m)
        mixer: Any = block.mixer
        ffn: Any = block.ffn
        conv = {"conv_size": mixer.short_conv} if mixer.short_conv else {}
        fields |= {
            "use_short_conv": bool(conv),
            **conv,
            "num_heads": mixer.n_heads,
            "norm_eps": fields.pop("rms_norm_eps"),
        }
        return fields | {"intermediate_size": ffn.hidden_width(m.d_model), **self.written_mixer(mixer, m.d_model)}

    def written_mixer(self, mixer: Any, d_model: int) -> dict[str, Any]:
        """Their further fields of the mixer."""
        raise NotImplementedError

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        d_model = mixer.in_proj.in_features
        own = mixer.widths
        layout: Layout = {
            "mixer_norm.weight": "attn_norm.weight",
            "ffn_norm.weight": "mlp_norm.weight",
            "mixer.in_proj.weight": tuple(
                part(f"attn.{PROJECTIONS[name]}.weight", width, d_model, **self.rows(mixer, name))
                for name, width in own.items()
            ),
            "mixer.out_proj.weight": "attn.o_proj.weight",
            **swiglu("mlp"),
        }
        if mixer.norm.weight is not None:
            layout["mixer.norm.weight"] = f"attn.{self.norm_of(mixer)}.weight"
        if mixer.convolution is not None:
            size = mixer.convolution.weight.shape[1]
            layout["mixer.convolution.weight"] = tuple(
                part(f"attn.{name}_conv1d.weight", own[name], 1, size, pattern="c 1 w -> c w") for name in "qkv"
            )
        return layout | self.further(mixer)

    def norm_of(self, mixer: Any) -> str:
        """Their name of the norm of the output."""
        return self.norm_name

    def rows(self, mixer: Any, name: str) -> dict[str, Any]:
        """What is done to the rows of a projection."""
        return {}

    def further(self, mixer: Any) -> Layout:
        """Tensors of the mixer beyond projections, convolution and norm."""
        return {}


class GLA(Fla):
    """Gated linear attention; RetNet's layer in fla has the same fields."""

    name, model_type, class_name = "gla", "gla", "GLAForCausalLM"
    mixers = ("gla",)
    expand = (0.5, 1.0)

    def mixer_fields(self, c: Fields, d_model: int) -> dict[str, Any]:
        c.only(feature_map=None, use_gk=True, use_gv=False, clamp_min=None, num_kv_heads=(None, c.values["num_heads"]))
        gate, affine = c.take("use_output_gate", True), c.take("elementwise_affine", True)
        short_conv = {} if c.take("use_short_conv", False) else {"short_conv": None}
        expand = {f"expand_{name}": c.take(f"expand_{name}", self.expand["kv".index(name)]) for name in "kv"}
        return {"gate": "swish" if gate else "none", "norm_affine": affine, "head_norm": "rms", **short_conv, **expand}

    def written_mixer(self, mixer: Any, d_model: int) -> dict[str, Any]:
        expand = {"expand_k": mixer.expand_k, "expand_v": mixer.expand_v}
        return expand | {"use_output_gate": mixer.gate != "none", "elementwise_affine": mixer.norm_affine}

    def norm_of(self, mixer: Any) -> str:
        return "g_norm" if mixer.config.gate == "none" else "g_norm_swish_gate"

    def further(self, mixer: Any) -> Layout:
        return {f"mixer.decay_proj.{ours}": f"attn.gk_proj.{theirs}" for ours, theirs in LOW_RANK.items()}


class RetNet(GLA):
    """fla's RetNet: turned as RoFormer's, RMS norms with weights, no row normaliser."""

    name, model_type, class_name = "fla-retnet", "retnet", "RetNetForCausalLM"
    mixers = ("retention",)
    expand, ratio = (1.0, 2.0), 2

    def mixer_fields(self, c: Fields, d_model: int) -> dict[str, Any]:
        # its model has no short convolution, whatever use_short_conv says
        return super().mixer_fields(c, d_model) | {"rotation": "rope", "row_norm": False, "short_conv": None}

    def rows(self, mixer: Any, name: str) -> dict[str, Any]:
        return {"pattern": PAIRS, "h": mixer.n_heads, "pair": 2} if name in "qk" else {}

    def further(self, mixer: Any) -> Layout:
        return {}


class DeltaNet(Fla):
    """DeltaNet."""

    name, model_type, class_name = "delta-net", "delta_net", "DeltaNetForCausalLM"
    mixers = ("delta_net",)

    def mixer_fields(self, c: Fields, d_model: int) -> dict[str, Any]:
        c.only(qk_activation="silu", qk_norm="l2", use_beta=True, use_output_norm=True)
        expand = {f"expand_{name}": c.take(f"expand_{name}", 1.0) for name in "kv"}
        return {"gate": "swish" if c.take("use_gate", False) else "none", **neg_eigval(c), **expand}

    def written_mixer(self, mixer: Any, d_model: int) -> dict[str, Any]:
        fields = {"use_gate": mixer.gate != "none", "allow_neg_eigval": mixer.allow_neg_eigval}
        return fields | {"expand_k": mixer.expand_k, "expand_v": mixer.expand_v}


class GatedDeltaNet(Fla):
    """Gated DeltaNet, whose heads need not divide d_model."""

    name, model_type, class_name = "gated-deltanet", "gated_deltanet", "GatedDeltaNetForCausalLM"
    mixers = ("gated_delta_net",)
    expand_v = 2.0

    def mixer_fields(self, c: Fields, d_model: int) -> dict[str, Any]:
        c.only(num_v_heads=(None, c.values["num_heads"]))
        gate, used = c.take("output_gate_activation", "swish"), c.take("use_gate", True)
        gate = "swish" if gate == "silu" else gate
        return {"gate": gate if used else "none", **self.widths(c, d_model), **neg_eigval(c)}

    def widths(self, c: Fields, d_model: int) -> dict[str, Any]:
        """Widths of keys and values over d_model."""
        keys = c.values["num_heads"] * c.take("head_dim") / d_model
        return {"expand_k": keys, "expand_v": keys * c.take("expand_v", self.expand_v)}

    def written_mixer(self, mixer: Any, d_model: int) -> dict[str, Any]:
        gate = {"use_gate": mixer.gate != "none"}
        if mixer.gate != "none":
            gate["output_gate_activation"] = mixer.gate
        return gate | self.written_widths(mixer, d_model)

    def written_widths(self, mixer: Any, d_model: int) -> dict[str, Any]:
        """Their fields of widths."""
        return {
            "head_dim": round(mixer.expand_k * d_model) // mixer.n_heads,
            "expand_v": mixer.expand_v / mixer.expand_k,
            "allow_neg_eigval": mixer.allow_neg_eigval,
        }

    def further(self, mixer: Any) -> Layout:
        return {"mixer.decay.A_log": "attn.A_log", "mixer.decay.dt_bias": "attn.dt_bias"}


class KDA(GatedDeltaNet):
    """Kimi Delta Attention."""

    name, model_type, class_name = "kda", "kda", "KDAForCausalLM"
    mixers = ("kda",)
    expand_v = 1.0

    def mixer_fields(self, c: Fields, d_model: int) -> dict[str, Any]:
        c.only(num_v_heads=(None, c.values["num_heads"]), safe_gate=False, lower_bound=None)
        return {"gate": "sigmoid", "gate_bias": True, **self.widths(c, d_model), **neg_eigval(c)}

    def written_mixer(self, mixer: Any, d_model: int) -> dict[str, Any]:
        return self.written_widths(mixer, d_model)

    def further(self, mixer: Any) -> Layout:
        names = {"decay_proj.down.weight": "f_proj.0.weight", "decay_proj.up.weight": "f_proj.1.weight"}
        names |= {f"gate_proj.{ours}": f"g_proj.{theirs}" for ours, theirs in LOW_RANK.items()}
        heads, width = mixer.decay.dt_bias.shape
        bias = part("attn.dt_bias", heads * width, pattern="(h k) -> h k", h=heads)
        copied = {f"mixer.{ours}": f"attn.{theirs}" for ours, theirs in names.items()}
        return {"mixer.decay.A_log": "attn.A_log", "mixer.decay.dt_bias": bias, **copied}


def neg_eigval(c: Fields) -> dict[str, Any]:
    """Whether the rate of writing goes up to 2."""
    return {"allow_neg_eigval": c.take("allow_neg_eigval", False)}
