"""Llama, Mistral and Qwen3 of transformers: softmax attention with grouped heads, and a gated network."""

from typing import Any

from ..blocks import Block
from ..models import ModelConfig
from .architecture import Architecture, Fields, Layout
from .layout import Part, part

PAIRS = "(h pair k) d -> (h k pair) d"
"""Rows of heads: theirs turn pairs (j, j + K/2) of dimensions, ours (2j, 2j + 1)."""


class Llama(Architecture):
    """Llama: no biases, one window for all layers or none."""

    name, library, model_type, class_name = "llama", "transformers", "llama", "LlamaForCausalLM"
    mixers = ("attention",)
    qk_norm = "none"

    def read(self, c: Fields) -> dict[str, Any]:
        c.only(attention_bias=False, mlp_bias=False)
        mixer = {"window": self.window(c), "qk_norm": self.qk_norm, **attention_fields(c)}
        norm = rms_norm(c)
        return model_fields(c) | {
            "blocks": {"attn": {"mixer": mixer, "ffn": swiglu_fields(c), "norm": norm}},
            "norm": norm,
        }

    def window(self, c: Fields) -> int | None:
        """The window of all layers."""
        return None

    def write(self, m: ModelConfig) -> dict[str, Any]:
        block = m.blocks[m.layers[0]]
        return written_fields(m) | written_attention(block.mixer, m.d_model) | written_swiglu(block.ffn, m.d_model)

    def block(self, block: Block) -> Layout:
        return {**norms(), **attention(block), **swiglu("mlp")}


class Mistral(Llama):
    """Llama with a window."""

    name, model_type, class_name = "mistral", "mistral", "MistralForCausalLM"

    def window(self, c: Fields) -> int | None:
        return c.take("sliding_window", None)

    def write(self, m: ModelConfig) -> dict[str, Any]:
        mixer: Any = m.blocks[m.layers[0]].mixer
        return super().write(m) | {"sliding_window": mixer.window}


class Qwen3(Llama):
    """Llama with norms of queries and keys; some layers may have a window."""

    name, model_type, class_name = "qwen3", "qwen3", "Qwen3ForCausalLM"
    qk_norm = "rms"
    harmless = "max_window_layers use_sliding_window"

    def read(self, c: Fields) -> dict[str, Any]:
        window, types = c.take("sliding_window", None), c.take("layer_types", None)
        read = super().read(c)
        full, types = read["blocks"]["attn"], types or ["full_attention"] * read["n_layers"]
        for kind in types:
            if kind not in ("full_attention", "sliding_attention"):
                raise c.refusal("layer_types", kind, "full_attention or sliding_attention")
        mixer = full["mixer"] | {"norm_eps": read["norm"]["eps"]}
        kinds = {"full_attention": mixer, "sliding_attention": mixer | {"window": window}}
        blocks = {kind: full | {"mixer": kinds[kind]} for kind in dict.fromkeys(types)}
        return read | {"blocks": blocks, "pattern": types}

    def write(self, m: ModelConfig) -> dict[str, Any]:
        mixers: list[Any] = [m.blocks[name].mixer for name in m.layers]
        windows = [mixer.window for mixer in mixers]
        types = ["full_attention" if window is None else "sliding_attention" for window in windows]
        sliding = next(filter(None, windows), None)
        return super().write(m) | {
            "layer_types": types,
            "sliding_window": sliding,
            "use_sliding_window": sliding is not None,
            "max_window_layers": types.count("full_attention"),
        }


def model_fields(c: Fields, *, tied: bool = False) -> dict[str, Any]:
    """Fields of a model that have the same meaning everywhere; `tied` is the default of tie_word_embeddings."""
    return {
        "d_model": c.take("hidden_size"),
        "n_layers": c.take("num_hidden_layers"),
        "vocab_size": c.take("vocab_size"),
        "tie_embeddings": c.take("tie_word_embeddings", tied),
    }


def written_fields(m: ModelConfig) -> dict[str, Any]:
    """The same, theirs."""
    return {
        "hidden_size": m.d_model,
        "num_hidden_layers": m.n_layers,
        "vocab_size": m.vocab_size,
        "tie_word_embeddings": m.tie_embeddings,
        "rms_norm_eps": m.norm.eps,
    }


def rms_norm(c: Fields) -> dict[str, Any]:
    """The norm of all places."""
    return {"kind": "rmsnorm", "eps": c.take("rms_norm_eps", 1e-6)}


def attention_fields(c: Fields) -> dict[str, Any]:
    """Heads and rotation of attention."""
    heads = c.take("num_attention_heads")
    rope = dict(c.take("rope_parameters", None) or c.take("rope_scaling", None) or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    base = rope.pop("rope_theta", c.take("rope_theta", 10000.0))
    share = rope.pop("partial_rotary_factor", c.take("partial_rotary_factor", 1.0))
    if kind != "default" or rope:
        raise c.refusal("rope_parameters", {"rope_type": kind, **rope}, "rope_type = default, without scaling")
    return {
        "kind": "attention",
        "n_heads": heads,
        "n_kv_heads": c.take("num_key_value_heads", heads),
        "head_dim": c.take("head_dim", c.values["hidden_size"] // heads),
        "rope_base": float(base),
        "partial_rotary_factor": float(share),
    }


def written_attention(mixer: Any, d_model: int) -> dict[str, Any]:
    """The same, theirs."""
    rope = {"rope_type": "default", "rope_theta": mixer.rope_base}
    partial = {"partial_rotary_factor": mixer.partial_rotary_factor} if mixer.partial_rotary_factor != 1 else {}
    return {
        "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.n_kv_heads or mixer.n_heads,
        "head_dim": mixer.head_dim or d_model // mixer.n_heads,
        "rope_parameters": rope | partial,
    }


def swiglu_fields(c: Fields, width: str = "intermediate_size", act: str = "hidden_act") -> dict[str, Any]:
    """A gated network, whose width here is a multiple of d_model."""
    c.only(**{act: ("silu", "swish")})
    return {"kind": "swiglu", "expansion": c.take(width) / c.values["hidden_size"]}


def written_swiglu(ffn: Any, d_model: int) -> dict[str, Any]:
    """The same, theirs."""
    return {"intermediate_size": ffn.hidden_width(d_model), "hidden_act": ffn.activation}


def norms(mixer: str = "input_layernorm", ffn: str = "post_attention_layernorm") -> Layout:
    """The norms before the mixer and before the network."""
    return {"mixer_norm.weight": f"{mixer}.weight", "ffn_norm.weight": f"{ffn}.weight"}


def swiglu(at: str) -> Layout:
    """A gated network."""
    return {f"ffn.{name}.weight": f"{at}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}


def attention(block: Block, at: str = "self_attn") -> Layout:
    """Attention: queries and keys whose pairs lie side by side, then values."""
    mixer: Any = block.mixer
    d_model, width = mixer.in_proj.in_features, mixer.head_dim

    def turned(name: str, heads: int) -> Part:
        sizes = {"pair": 2, "k": width // 2}
        return part(f"{at}.{name}.weight", heads * width, d_model, pattern=PAIRS, **sizes)

    layout: Layout = {
        "mixer.in_proj.weight": (
            turned("q_proj", mixer.n_heads),
            turned("k_proj", mixer.n_kv_heads),
            part(f"{at}.v_proj.weight", mixer.n_kv_heads * width, d_model),
        ),
        "mixer.out_proj.weight": f"{at}.o_proj.weight",
    }
    if mixer.qk_norm is not None:
        layout |= {
            f"mixer.qk_norm.{name}_weight": part(
                f"{at}.{name}_norm.weight", width, pattern="(pair k) -> (k pair)", pair=2
            )
            for name in "qk"
        }
    return layout
