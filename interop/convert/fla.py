"""Models of fla (flash-linear-attention): mixers with separate projections and convolutions, and a gated network."""

from collections.abc import Mapping
from typing import Any

from ...blocks import Block
from .architecture import Architecture, Layout
from .fields import Field, Table, choice, head_size, only, same, width
from .layout import Part, part
from .llama import BASE, PAIRS, norms, swiglu

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "g_proj", "beta": "b_proj", "dt": "a_proj"}
"""fla's names of the projections that seqmix computes in one product."""
LOW_RANK = {"down.weight": "0.weight", "up.weight": "1.weight", "up.bias": "1.bias"}
"""Tensors of a low-rank map with a bias: seqmix's names and fla's."""
GATES = {"swish": "swish", "silu": "swish", "sigmoid": "sigmoid"}
"""Gate activations: fla's names and seqmix's."""
NEGATIVE: dict[str, str | Field] = {"allow_neg_eigval": same("mixer.allow_neg_eigval", default=False)}
"""Field of the delta-rule mixers that allows negative eigenvalues."""


def convolution_fields(*, default: bool = True) -> dict[str, str | Field]:
    """Make the fields of the short convolution; `default` is the value of `use_short_conv` if config.json lacks it."""
    used = same(
        "mixer.short_conv",
        default=default,
        read=lambda used, theirs: theirs.get("conv_size", 4) if used else None,
        write=lambda size, _: bool(size),
    )
    return {"conv_size": same("mixer.short_conv", default=4, write=lambda size, _: size or 4), "use_short_conv": used}


def network_width(ratio: int) -> Field:
    """Make the field of the feed-forward width, by default 2/3 * ratio * d_model, rounded up to a multiple of 256."""

    def default(theirs: Mapping[str, Any]) -> int:
        return -(-int(theirs["hidden_size"] * (theirs.get("hidden_ratio") or ratio) * 2 / 3) // 256) * 256

    return width("ffn.expansion", default)


class Fla(Architecture):
    """Base class of fla's models: shared fields and tensors."""

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
    ignored_fields = (
        "attn_mode fuse_norm fuse_swiglu fuse_cross_entropy fuse_linear_cross_entropy use_l2warp hidden_ratio"
    )
    embedding = "model.embeddings.weight"
    rotated = ""
    """Letters of the projections to which RoPE is applied: "qk", or "" for none."""

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        layout = norms("attn_norm", "mlp_norm") | swiglu("mlp") | {"mixer.out_proj.weight": "attn.o_proj.weight"}
        layout["mixer.in_proj.weight"] = projections(mixer, "attn", self.rotated)
        if mixer.norm.weight is not None:
            layout["mixer.norm.weight"] = f"attn.{self.norm_of(mixer)}.weight"
        return (
            layout | (convolutions(mixer, "attn") if mixer.convolution is not None else {}) | self.extra_tensors(mixer)
        )

    def norm_of(self, mixer: Any) -> str:
        """Return fla's name of the mixer's output norm."""
        return "o_norm"

    def extra_tensors(self, mixer: Any) -> Layout:
        """Return the layout of the mixer's tensors other than projections, convolution and norm."""
        return {}


def retention_fields(expand_k: float, expand_v: float) -> dict[str, str | Field]:
    """Make the fields that RetNet and GLA share; the arguments are the defaults of `expand_k` and `expand_v`."""
    return {
        "expand_k": same("mixer.expand_k", default=expand_k),
        "expand_v": same("mixer.expand_v", default=expand_v),
        "use_output_gate": choice("mixer.gate", {True: "swish", False: "none"}, default=True),
        "elementwise_affine": same("mixer.norm_affine", default=True),
        "feature_map": only(None),
        "num_kv_heads": only(None),
    }


class GLA(Fla):
    """Gated linear attention (GLA) of fla."""

    name = "gla"
    model_type = "gla"
    class_name = "GLAForCausalLM"
    common = Fla.shared | Table(
        {"mixer.kind": "gla", "mixer.head_norm": "rms"},
        retention_fields(0.5, 1.0)
        | convolution_fields(default=False)
        | {"use_gk": only(True), "use_gv": only(False), "clamp_min": only(None)},
    )

    def tensor_aliases(self, values: Mapping[str, Any]) -> Mapping[str, str]:
        # without fuse_norm, the norm of a gated output has another name; exports use the fused name
        return {".attn.g_norm.": ".attn.g_norm_swish_gate."} if values.get("use_output_gate", True) else {}

    def norm_of(self, mixer: Any) -> str:
        return "g_norm" if mixer.config.gate == "none" else "g_norm_swish_gate"

    def extra_tensors(self, mixer: Any) -> Layout:
        return {f"mixer.decay_proj.{ours}": f"attn.gk_proj.{theirs}" for ours, theirs in LOW_RANK.items()}


class RetNet(GLA):
    """RetNet of fla: RoPE instead of xPos, RMS norms with weights, and no row normaliser."""

    name = "fla-retnet"
    model_type = "retnet"
    class_name = "RetNetForCausalLM"
    common = Fla.shared | Table(
        {"mixer.kind": "retention", "mixer.head_norm": "rms", "mixer.rotation": "rope", "mixer.row_norm": False},
        retention_fields(1.0, 2.0) | {"intermediate_size": network_width(2)},
    )
    ignored_fields = Fla.ignored_fields + " use_short_conv conv_size"  # fla's model never has a convolution
    rotated = "qk"

    def extra_tensors(self, mixer: Any) -> Layout:
        return {}


class DeltaNet(Fla):
    """DeltaNet of fla."""

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
        | convolution_fields()
        | NEGATIVE,
    )


def head_fields(expand_v: float) -> dict[str, str | Field]:
    """Make the fields of numbers and widths of heads; `expand_v` is the default of the field of that name.

    The widths need not divide d_model, and several value heads may share a query and key head.
    """
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
    """Gated DeltaNet of fla."""

    name = "gated-deltanet"
    model_type = "gated_deltanet"
    class_name = "GatedDeltaNetForCausalLM"
    common = Fla.shared | Table(
        {"mixer.kind": "gated_delta_net"},
        head_fields(2.0)
        | convolution_fields()
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

    def extra_tensors(self, mixer: Any) -> Layout:
        return {"mixer.decay.A_log": "attn.A_log", "mixer.decay.dt_bias": "attn.dt_bias"}


class KDA(GatedDeltaNet):
    """Kimi Delta Attention (KDA) of fla."""

    name = "kda"
    model_type = "kda"
    class_name = "KDAForCausalLM"
    common = Fla.shared | Table(
        {"mixer.kind": "kda", "mixer.gate": "sigmoid", "mixer.gate_bias": True},
        head_fields(1.0) | convolution_fields() | NEGATIVE | {"safe_gate": only(False), "lower_bound": only(None)},
    )

    def extra_tensors(self, mixer: Any) -> Layout:
        names = {"decay_proj.down.weight": "f_proj.0.weight", "decay_proj.up.weight": "f_proj.1.weight"}
        names |= {f"gate_proj.{ours}": f"g_proj.{theirs}" for ours, theirs in LOW_RANK.items()}
        heads, size = mixer.decay.dt_bias.shape
        bias = part("attn.dt_bias", heads * size, pattern="(h k) -> h k", h=heads)
        layout: Layout = {f"mixer.{ours}": f"attn.{theirs}" for ours, theirs in names.items()}
        return layout | {"mixer.decay.A_log": "attn.A_log", "mixer.decay.dt_bias": bias}


def projections(mixer: Any, prefix: str, rotated: str = "") -> tuple[Part, ...]:
    """Return the parts of seqmix's fused input projection, each of which is a projection of its own in fla.

    The rows of projections whose letter is in `rotated` are reordered, so that rotated pairs lie side by side.
    """
    d_model = mixer.in_proj.in_features
    pairs = {"h": mixer.n_heads, "pair": 2}
    return tuple(
        part(f"{prefix}.{PROJECTIONS[name]}.weight", rows, d_model, pattern=PAIRS if name in rotated else "", **pairs)
        for name, rows in mixer.widths.items()
    )


def convolutions(mixer: Any, prefix: str) -> Layout:
    """Return the layout of the short convolutions of queries, keys and values, which seqmix fuses into one."""
    size = mixer.convolution.weight.shape[1]
    widths = mixer.widths
    parts = (part(f"{prefix}.{name}_conv1d.weight", widths[name], 1, size, pattern="c 1 w -> c w") for name in "qkv")
    return {"mixer.convolution.weight": tuple(parts)}
