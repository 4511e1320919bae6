"""Llama, Mistral and Qwen3 of transformers, and what other architectures share with them."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ..blocks import Block
from .architecture import Architecture, Layout
from .fields import Table, choice, refusal, same, width
from .layout import Part, part
from .theirs import Rotation, typed

BASE = Table(
    {"norm.kind": "rmsnorm"},
    {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "vocab_size": "vocab_size",
        "tie_word_embeddings": same("tie_embeddings", default=False),
    },
)
"""What is the same everywhere."""
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
"""By `rope_type`, the fields of a scaling here; theirs has one other name, below."""
LENGTHS = {"original_length": "original_max_position_embeddings"}
BIASES = choice("mixer.bias", {False: "none", True: "all"}, default=False)
PAIRS = "(h pair k) d -> (h k pair) d"
"""Rows of heads: theirs turn pairs (j, j + K/2) of dimensions, ours (2j, 2j + 1)."""


class Rotating(Architecture):
    """An architecture whose rotation has a field of its own fields."""

    def unfolded(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        plain = {name: x for name, x in values.items() if name not in ("rope_parameters", "rope_scaling")}
        rope = typed(values.get("rope_parameters") or values.get("rope_scaling") or {}, f"{where}: rope", Rotation)
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        known = {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        if kind == "llama3" and "max_position_embeddings" in values:
            rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
        fields = {name: LENGTHS.get(name, name) for name in SCALINGS.get(kind, ())}
        if (kind != "default" and kind not in SCALINGS) or rope.keys() != set(fields.values()):
            allowed = "rope_type = default, linear or llama3, with the fields of these"
            raise refusal(where, "rope_parameters", {"rope_type": kind, **rope}, allowed)
        if fields:
            known["scaling"] = {"kind": kind, **{ours: rope[name] for ours, name in fields.items()}}
        return plain | known

    def folded(self, values: dict[str, Any]) -> dict[str, Any]:
        # at the top too, where versions before 5 read them
        own = {name: values[name] for name in ("rope_theta", "partial_rotary_factor") if name in values}
        scaling = dict(values.pop("scaling", None) or {"kind": "default"})
        own |= {"rope_type": scaling.pop("kind"), **{LENGTHS.get(name, name): x for name, x in scaling.items()}}
        return values | ({"rope_parameters": own} if "rope_theta" in values or scaling else {})


class Llama(Rotating):
    """Llama."""

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
    """Llama with a window."""

    name = "mistral"
    model_type = "mistral"
    class_name = "MistralForCausalLM"
    common = MODEL | SWIGLU | HEADS | ROPE | Table({}, {"sliding_window": same("mixer.window", default=None)})


class Qwen2(Llama):
    """Llama with biases of queries, keys and values; some layers may have a window."""

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
    harmless = "max_window_layers use_sliding_window"

    def unfolded(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        full = {"layer_types": ["full_attention"] * values.get("num_hidden_layers", 0)}
        return super().unfolded(full | {name: x for name, x in values.items() if x is not None}, where)

    def folded(self, values: dict[str, Any]) -> dict[str, Any]:
        full = values["layer_types"].count("full_attention")
        windows = {"use_sliding_window": full < len(values["layer_types"]), "max_window_layers": full}
        return super().folded(values) | windows


class Qwen3(Qwen2):
    """Qwen2 with norms of queries and keys instead of biases."""

    name = "qwen3"
    model_type = "qwen3"
    class_name = "Qwen3ForCausalLM"
    common = Llama.common | Table({"mixer.qk_norm": "rms"}, {"rms_norm_eps": same("norm.eps", "mixer.norm_eps")})


def norms(mixer: str = "input_layernorm", ffn: str = "post_attention_layernorm") -> Layout:
    """The norms of the mixer and of the network."""
    return {"mixer_norm.weight": f"{mixer}.weight", "ffn_norm.weight": f"{ffn}.weight"}


def swiglu(
    theirs: str,
    ours: str = "ffn",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    *,
    bias: bool = False,
) -> Layout:
    """A gated network."""
    mine = ("gate_proj", "up_proj", "down_proj")
    return {
        f"{ours}.{each}.{kind}": f"{theirs}.{name}.{kind}"
        for each, name in zip(mine, names, strict=True)
        for kind in (("weight", "bias") if bias else ("weight",))
    }


def attention(mixer: Any, at: str = "self_attn") -> Layout:
    """Attention: queries and keys whose pairs lie side by side, then values."""
    size = mixer.head_dim
    turning = mixer.rotary_dim
    layout: Layout = {}

    def turned(name: str, heads: int, *columns: int) -> Part:
        if turning not in (0, size):
            return part(name, heads * size, *columns, index=turned_rows(heads, size, turning, size))
        pattern = PAIRS if columns else PAIRS.replace(" d", "")
        return part(name, heads * size, *columns, pattern=pattern, pair=2, k=size // 2)

    for kind, columns in (("weight", (mixer.in_proj.in_features,)), ("bias", ())):
        if getattr(mixer.in_proj, kind) is not None:
            layout[f"mixer.in_proj.{kind}"] = (
                turned(f"{at}.q_proj.{kind}", mixer.n_heads, *columns),
                turned(f"{at}.k_proj.{kind}", mixer.n_kv_heads, *columns),
                part(f"{at}.v_proj.{kind}", mixer.n_kv_heads * size, *columns),
            )
        if getattr(mixer.out_proj, kind) is not None:
            layout[f"mixer.out_proj.{kind}"] = f"{at}.o_proj.{kind}"
    for name in "qk" if mixer.qk_norm is not None else "":
        norm = part(f"{at}.{name}_norm.weight", size, pattern="(pair k) -> (k pair)", pair=2)
        layout[f"mixer.qk_norm.{name}_weight"] = norm
    return layout


def turned_rows(heads: int, size: int, turning: int, stride: int) -> tuple[int, ...]:
    """Rows of heads, of which every `stride` rows begin with one: first those that turn, in pairs, then the others."""
    pairs = torch.arange(turning).view(2, -1).T.flatten()
    head = torch.cat((pairs, torch.arange(turning, size)))
    return tuple((torch.arange(heads)[:, None] * stride + head).flatten().tolist())
