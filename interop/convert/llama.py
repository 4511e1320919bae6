"""Llama, Mistral, Qwen2 and Qwen3 of transformers, and tables and layouts that other architectures share with them."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ...blocks import Block
from .architecture import Architecture, Layout
from .fields import Table, choice, same, unsupported_value, width
from .layout import Part, part
from .source_config import Rotation, validate_types

BASE = Table(
    {"norm.kind": "rmsnorm"},
    {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "vocab_size": "vocab_size",
        "tie_word_embeddings": same("tie_embeddings", default=False),
    },
)
"""Fields that have the same names in most architectures."""
MODEL = BASE | Table({}, {"rms_norm_eps": same("norm.eps", default=1e-6)})
SILU = choice("ffn.activation", {"silu": "silu", "swish": "silu"}, "silu")
SWIGLU = Table({"ffn.kind": "swiglu"}, {"intermediate_size": width("ffn.expansion"), "hidden_act": SILU})
HEADS = Table(
    {"mixer.kind": "attention"},
    {
        "num_attention_heads": "mixer.n_heads",
        "num_key_value_heads": same("mixer.n_kv_heads", default=lambda theirs: theirs["num_attention_heads"]),
        "head_dim": same(
            "mixer.head_dim",
            default=lambda theirs: theirs["hidden_size"] // theirs["num_attention_heads"],
            write=lambda size, ours: size or ours["d_model"] // ours["mixer.n_heads"],
        ),
    },
)
ROPE = Table(
    {},
    {
        "rope_theta": same("mixer.rope_base", default=10000.0, read=lambda base, _: float(base)),
        "scaling": same("mixer.rope_scaling", default=None),
    },
)
SCALINGS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_length"),
}
"""seqmix's fields of a RoPE scaling, by `rope_type`."""
LENGTHS = {"original_length": "original_max_position_embeddings"}
"""Scaling fields that transformers names differently."""
BIASES = choice("mixer.bias", {False: "none", True: "all"}, default=False)
PAIRS = "(h pair k) d -> (h k pair) d"
"""Reorders the rows of heads: transformers rotates pairs (j, j + K/2) of dimensions, seqmix pairs (2j, 2j + 1)."""


class Rotating(Architecture):
    """An architecture with RoPE, whose parameters are nested in `rope_parameters` or `rope_scaling`."""

    def expand_fields(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        plain = {name: x for name, x in values.items() if name not in ("rope_parameters", "rope_scaling")}
        rope = validate_types(
            values.get("rope_parameters") or values.get("rope_scaling") or {}, f"{where}: rope", Rotation
        )
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        known = {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        if kind == "llama3" and "max_position_embeddings" in values:
            rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
        fields = {name: LENGTHS.get(name, name) for name in SCALINGS.get(kind, ())}
        if (kind != "default" and kind not in SCALINGS) or rope.keys() != set(fields.values()):
            allowed = "of rope_type default, linear or llama3, with the fields of that type only,"
            raise unsupported_value(where, "rope_parameters", {"rope_type": kind, **rope}, allowed)
        if fields:
            known["scaling"] = {"kind": kind, **{ours: rope[name] for ours, name in fields.items()}}
        return plain | known

    def collapse_fields(self, values: dict[str, Any]) -> dict[str, Any]:
        # these fields also stay at the top level, where versions of transformers before 5 read them
        rope = {name: values[name] for name in ("rope_theta", "partial_rotary_factor") if name in values}
        scaling = dict(values.pop("scaling", None) or {"kind": "default"})
        rope |= {"rope_type": scaling.pop("kind"), **{LENGTHS.get(name, name): x for name, x in scaling.items()}}
        return values | ({"rope_parameters": rope} if "rope_theta" in values or scaling else {})


class Llama(Rotating):
    """Llama of transformers."""

    name = "llama"
    model_type = "llama"
    class_name = "LlamaForCausalLM"
    common = (
        MODEL
        | SWIGLU
        | HEADS
        | ROPE
        | Table({}, {"attention_bias": BIASES, "mlp_bias": same("ffn.bias", default=False)})
    )

    def block(self, block: Block) -> Layout:
        ffn: Any = block.ffn
        return norms() | attention(block.mixer) | swiglu("mlp", bias=ffn.up_proj.bias is not None)


class Mistral(Llama):
    """Mistral: Llama with a sliding window."""

    name = "mistral"
    model_type = "mistral"
    class_name = "MistralForCausalLM"
    common = MODEL | SWIGLU | HEADS | ROPE | Table({}, {"sliding_window": same("mixer.window", default=None)})


class Qwen2(Llama):
    """Qwen2: Llama with biases of queries, keys and values; some layers may have a sliding window."""

    name = "qwen2"
    model_type = "qwen2"
    class_name = "Qwen2ForCausalLM"
    common = MODEL | SWIGLU | HEADS | ROPE | Table({"mixer.bias": "qkv"})
    kinds: ClassVar = {
        "layer_types": {
            "full_attention": Table({"mixer.window": None}),
            "sliding_attention": Table({}, {"sliding_window": "mixer.window"}),
        }
    }
    ignored_fields = "max_window_layers use_sliding_window"

    def expand_fields(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        default = {"layer_types": ["full_attention"] * values.get("num_hidden_layers", 0)}
        return super().expand_fields(default | {name: x for name, x in values.items() if x is not None}, where)

    def collapse_fields(self, values: dict[str, Any]) -> dict[str, Any]:
        n_full = values["layer_types"].count("full_attention")
        windows = {"use_sliding_window": n_full < len(values["layer_types"]), "max_window_layers": n_full}
        return super().collapse_fields(values) | windows


class Qwen3(Qwen2):
    """Qwen3: Qwen2 with norms of queries and keys instead of biases."""

    name = "qwen3"
    model_type = "qwen3"
    class_name = "Qwen3ForCausalLM"
    common = Llama.common | Table({"mixer.qk_norm": "rms"}, {"rms_norm_eps": same("norm.eps", "mixer.norm_eps")})


def norms(mixer: str = "input_layernorm", ffn: str = "post_attention_layernorm") -> Layout:
    """Return the layout of the two norms of a layer; the arguments are the library's names of them."""
    return {"mixer_norm.weight": f"{mixer}.weight", "ffn_norm.weight": f"{ffn}.weight"}


def swiglu(
    prefix: str,
    ours: str = "ffn",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    *,
    bias: bool = False,
) -> Layout:
    """Return the layout of a gated feed-forward network.

    Args:
        prefix: prefix of the library's tensor names.
        ours: prefix of the seqmix tensor names.
        names: the library's names of the gate, up and down projection.
        bias: True if the projections have biases.
    """
    our_names = ("gate_proj", "up_proj", "down_proj")
    return {
        f"{ours}.{our_name}.{kind}": f"{prefix}.{name}.{kind}"
        for our_name, name in zip(our_names, names, strict=True)
        for kind in (("weight", "bias") if bias else ("weight",))
    }


def attention(mixer: Any, prefix: str = "self_attn") -> Layout:
    """Return the layout of attention, with queries and keys reordered so that rotated pairs lie side by side."""
    size = mixer.head_dim
    rotary_dim = mixer.rotary_dim
    layout: Layout = {}

    def reorder(name: str, heads: int, *columns: int) -> Part:
        if rotary_dim not in (0, size):
            return part(name, heads * size, *columns, index=rotary_rows(heads, size, rotary_dim, size))
        pattern = PAIRS if columns else PAIRS.replace(" d", "")
        return part(name, heads * size, *columns, pattern=pattern, pair=2, k=size // 2)

    for kind, columns in (("weight", (mixer.in_proj.in_features,)), ("bias", ())):
        if getattr(mixer.in_proj, kind) is not None:
            layout[f"mixer.in_proj.{kind}"] = (
                reorder(f"{prefix}.q_proj.{kind}", mixer.n_heads, *columns),
                reorder(f"{prefix}.k_proj.{kind}", mixer.n_kv_heads, *columns),
                part(f"{prefix}.v_proj.{kind}", mixer.n_kv_heads * size, *columns),
            )
        if getattr(mixer.out_proj, kind) is not None:
            layout[f"mixer.out_proj.{kind}"] = f"{prefix}.o_proj.{kind}"
    for name in "qk" if mixer.qk_norm is not None else "":
        norm = part(f"{prefix}.{name}_norm.weight", size, pattern="(pair k) -> (k pair)", pair=2)
        layout[f"mixer.qk_norm.{name}_weight"] = norm
    return layout


def rotary_rows(heads: int, size: int, rotary_dim: int, stride: int) -> tuple[int, ...]:
    """Return the library's row numbers in seqmix's order, with partial RoPE: per head, rotated pairs, then the rest.

    Args:
        heads: number of heads.
        size: rows of a head.
        rotary_dim: rows of a head that are rotated.
        stride: distance between the first rows of consecutive heads.
    """
    pairs = torch.arange(rotary_dim).view(2, -1).T.flatten()
    head = torch.cat((pairs, torch.arange(rotary_dim, size)))
    return tuple((torch.arange(heads)[:, None] * stride + head).flatten().tolist())
