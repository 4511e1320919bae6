"""Models of fla (flash-linear-attention): a mixer with separate projections and convolutions, and a gated network."""

from collections.abc import Mapping
from typing import Any

from ..blocks import Block
from .architecture import Architecture, Layout
from .fields import Field, Table, choice, head_size, only, same, width
from .layout import Part, part
from .llama import BASE, PAIRS, norms, swiglu

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "g_proj", "beta": "b_proj", "dt": "a_proj"}
"""Their names of what is projected here in one product."""
LOW_RANK = {"down.weight": "0.weight", "up.weight": "1.weight", "up.bias": "1.bias"}
"""The tensors of a map of low rank with a bias."""
GATES = {"swish": "swish", "silu": "swish", "sigmoid": "sigmoid"}
NEGATIVE: dict[str, str | Field] = {"allow_neg_eigval": same("mixer.allow_neg_eigval", default=False)}


def convolved(*, default: bool = True) -> dict[str, str | Field]:
    """The fields of the short convolution."""
    used = same(
        "mixer.short_conv",
        default=default,
        read=lambda used, theirs: theirs.get("conv_size", 4) if used else None,
        write=lambda size, _: bool(size),
    )
    return {"conv_size": same("mixer.short_conv", default=4, write=lambda size, _: size or 4), "use_short_conv": used}


def network_width(ratio: int) -> Field:
    """The width of the network, by default a multiple of 256 near 2/3 of a ratio of d_model."""

    def default(theirs: Mapping[str, Any]) -> int:
        return -(-int(theirs["hidden_size"] * (theirs.get("hidden_ratio") or ratio) * 2 / 3) // 256) * 256

    return width("ffn.expansion", default)


class Fla(Architecture):
    """What all these models share."""

    library = "fla"
    shared = BASE | Table(
        {"ffn.kind": "swiglu"},
        {
            "num_heads": "mixer.n_heads",
            "intermediate_size": network_width(4),
            "hidden_act": choice("ffn.activation", {"swish": "silu"}, default="swish"),
            "norm_eps": same("norm.eps", "mixer.norm_eps", default=1e-6),
            "attn": only(None),
            "attnres_block_size": only(None),
        },
    )
    harmless = "attn_mode fuse_norm fuse_swiglu fuse_cross_entropy fuse_linear_cross_entropy use_l2warp hidden_ratio"
    embedding = "model.embeddings.weight"
    turned = ""
    """The names of projections whose rows turn."""

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        layout = norms("attn_norm", "mlp_norm") | swiglu("mlp") | {"mixer.out_proj.weight": "attn.o_proj.weight"}
        layout["mixer.in_proj.weight"] = projections(mixer, "attn", self.turned)
        if mixer.norm.weight is not None:
            layout["mixer.norm.weight"] = f"attn.{self.norm_of(mixer)}.weight"
        return layout | (convolutions(mixer, "attn") if mixer.convolution is not None else {}) | self.further(mixer)

    def norm_of(self, mixer: Any) -> str:
        """Their name of the norm of the output."""
        return "o_norm"

    def further(self, mixer: Any) -> Layout:
        """Tensors of the mixer beyond projections, convolution and norm."""
        return {}


def attention_like(expand_k: float, expand_v: float) -> dict[str, str | Field]:
    """Fields that RetNet and GLA share."""
    return {
        "expand_k": same("mixer.expand_k", default=expand_k),
        "expand_v": same("mixer.expand_v", default=expand_v),
        "use_output_gate": choice("mixer.gate", {True: "swish", False: "none"}, default=True),
        "elementwise_affine": same("mixer.norm_affine", default=True),
        "feature_map": only(None),
        "num_kv_heads": only(None),
    }


class GLA(Fla):
    """Gated linear attention."""

    name = "gla"
    model_type = "gla"
    class_name = "GLAForCausalLM"
    common = Fla.shared | Table(
        {"mixer.kind": "gla", "mixer.head_norm": "rms"},
        attention_like(0.5, 1.0)
        | convolved(default=False)
        | {"use_gk": only(True), "use_gv": only(False), "clamp_min": only(None)},
    )

    def renamed(self, values: Mapping[str, Any]) -> Mapping[str, str]:
        # without fuse_norm the norm of a gated output has another name; the way back is the fused one
        return {".attn.g_norm.": ".attn.g_norm_swish_gate."} if values.get("use_output_gate", True) else {}

    def norm_of(self, mixer: Any) -> str:
        return "g_norm" if mixer.config.gate == "none" else "g_norm_swish_gate"

    def further(self, mixer: Any) -> Layout:
        return {f"mixer.decay_proj.{ours}": f"attn.gk_proj.{theirs}" for ours, theirs in LOW_RANK.items()}


class RetNet(GLA):
    """fla's RetNet: turned as RoFormer's, RMS norms with weights, no row normaliser."""

    name = "fla-retnet"
    model_type = "retnet"
    class_name = "RetNetForCausalLM"
    common = Fla.shared | Table(
        {"mixer.kind": "retention", "mixer.head_norm": "rms", "mixer.rotation": "rope", "mixer.row_norm": False},
        attention_like(1.0, 2.0) | {"intermediate_size": network_width(2)},
    )
    harmless = Fla.harmless + " use_short_conv conv_size"  # its model has no convolution, whatever they say
    turned = "qk"

    def further(self, mixer: Any) -> Layout:
        return {}


class DeltaNet(Fla):
    """DeltaNet."""

    name = "delta-net"
    model_type = "delta_net"
    class_name = "DeltaNetForCausalLM"
    common = Fla.shared | Table(
        {"mixer.kind": "delta_net"},
        {
            "expand_k": same("mixer.expand_k", default=1.0),
            "expand_v": same("mixer.expand_v", default=1.0),
            "use_gate": choice("mixer.gate", {True: "swish", False: "none"}, default=False),
            "qk_activation": only("silu"),
            "qk_norm": only("l2"),
            "use_beta": only(True),
            "use_output_norm": only(True),
        }
        | convolved()
        | NEGATIVE,
    )


def widths(expand_v: float) -> dict[str, str | Field]:
    """Widths of heads, which need not divide d_model; heads of values may share queries and keys."""
    return {
        "num_v_heads": same(
            "mixer.n_heads",
            default=lambda theirs: theirs["num_heads"],
            write=lambda heads, ours: None if heads == ours["mixer.n_qk_heads"] else heads,
        ),
        "num_heads": "mixer.n_qk_heads",
        "head_dim": head_size("mixer.expand_k", heads="num_heads", of="mixer.n_qk_heads"),
        "expand_v": same(
            "mixer.expand_v",
            default=expand_v,
            read=lambda expand, theirs: (
                int(theirs["head_dim"] * expand)
                * (theirs.get("num_v_heads") or theirs["num_heads"])
                / theirs["hidden_size"]
            ),
            write=lambda expand, ours: (
                expand / ours["mixer.n_heads"] * ours["mixer.n_qk_heads"] / ours["mixer.expand_k"]
            ),
        ),
    }


class GatedDeltaNet(Fla):
    """Gated DeltaNet."""

    name = "gated-deltanet"
    model_type = "gated_deltanet"
    class_name = "GatedDeltaNetForCausalLM"
    common = Fla.shared | Table(
        {"mixer.kind": "gated_delta_net"},
        widths(2.0)
        | convolved()
        | NEGATIVE
        | {
            "output_gate_activation": same(
                "mixer.gate",
                default="swish",
                read=lambda gate, _: GATES[gate],
                write=lambda gate, _: "swish" if gate == "none" else gate,
                allowed=("swish", "silu", "sigmoid"),
            ),
            "use_gate": same(
                "mixer.gate",
                default=True,
                read=lambda used, theirs: GATES[theirs.get("output_gate_activation") or "swish"] if used else "none",
                write=lambda gate, _: gate != "none",
            ),
        },
    )

    def further(self, mixer: Any) -> Layout:
        return {"mixer.decay.A_log": "attn.A_log", "mixer.decay.dt_bias": "attn.dt_bias"}


class KDA(GatedDeltaNet):
    """Kimi Delta Attention."""

    name = "kda"
    model_type = "kda"
    class_name = "KDAForCausalLM"
    common = Fla.shared | Table(
        {"mixer.kind": "kda", "mixer.gate": "sigmoid", "mixer.gate_bias": True},
        widths(1.0) | convolved() | NEGATIVE | {"safe_gate": only(False), "lower_bound": only(None)},
    )

    def further(self, mixer: Any) -> Layout:
        names = {"decay_proj.down.weight": "f_proj.0.weight", "decay_proj.up.weight": "f_proj.1.weight"}
        names |= {f"gate_proj.{ours}": f"g_proj.{theirs}" for ours, theirs in LOW_RANK.items()}
        heads, size = mixer.decay.dt_bias.shape
        bias = part("attn.dt_bias", heads * size, pattern="(h k) -> h k", h=heads)
        copied: Layout = {f"mixer.{ours}": f"attn.{theirs}" for ours, theirs in names.items()}
        return copied | {"mixer.decay.A_log": "attn.A_log", "mixer.decay.dt_bias": bias}


def projections(mixer: Any, at: str, turned: str = "") -> tuple[Part, ...]:
    """What is projected, one tensor of theirs each; of names in `turned`, pairs of rows lie side by side here."""
    d_model = mixer.in_proj.in_features
    pairs = {"h": mixer.n_heads, "pair": 2}
    return tuple(
        part(f"{at}.{PROJECTIONS[name]}.weight", rows, d_model, pattern=PAIRS if name in turned else "", **pairs)
        for name, rows in mixer.widths.items()
    )


def convolutions(mixer: Any, at: str) -> Layout:
    """Short convolutions of queries, keys and values, which are one here."""
    size = mixer.convolution.weight.shape[1]
    widths = mixer.widths
    parts = (part(f"{at}.{name}_conv1d.weight", widths[name], 1, size, pattern="c 1 w -> c w") for name in "qkv")
    return {"mixer.convolution.weight": tuple(parts)}
