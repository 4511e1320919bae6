"""RWKV-4 of transformers and RWKV-7 of fla: each layer becomes two in seqmix, time mixing and channel mixing."""

from collections.abc import Mapping
from typing import Any, ClassVar

from ...blocks import Block
from ...models import LanguageModel
from ...registry import SeqmixError
from .architecture import Architecture, Layout
from .fields import Field, Table, only, same, unsupported_value, width
from .layout import Part, part

TIME = "time"
CHANNEL = "channel"
NORM = {"kind": "layernorm", "eps": 1e-5, "bias": True}


class Halves(Architecture):
    """An architecture whose layers each become two alternating blocks in seqmix."""

    types: ClassVar[str] = "layer_types"
    """Name of the field, in the tables only, that has the kind of each seqmix block."""
    halves: ClassVar[tuple[str, str]] = (TIME, CHANNEL)
    """Kinds of the two blocks of a layer."""

    def expand_fields(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        if (n_layers := values.get("num_hidden_layers")) is None:
            raise SeqmixError(f"{where} lacks num_hidden_layers")
        return {**values, "num_hidden_layers": 2 * n_layers, self.types: list(self.halves) * n_layers}

    def collapse_fields(self, values: dict[str, Any]) -> dict[str, Any]:
        types = values.pop(self.types)
        if types != list(self.halves) * (len(types) // 2):
            raise SeqmixError(
                f"{self.name} needs layers that alternate between {' and '.join(self.mixers)}, got {', '.join(types)}"
            )
        return values | {"num_hidden_layers": len(types) // 2}

    def layer(self, index: int) -> int:
        return index // 2


class RWKV4(Halves):
    """RWKV-4 of transformers."""

    name = "rwkv4"
    model_type = "rwkv"
    class_name = "RwkvForCausalLM"
    common = Table(
        {"ffn": None, "embedding_norm": NORM, **{f"norm.{name}": value for name, value in NORM.items()}},
        {
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "vocab_size": "vocab_size",
            "tie_word_embeddings": same("tie_embeddings", default=False),
            "layer_norm_epsilon": only(1e-5),  # transformers fixes the eps of the final norm
        },
    )
    kinds: ClassVar = {
        "layer_types": {
            TIME: Table(
                {"mixer.kind": "rwkv4"},
                {"attention_hidden_size": width("mixer.expand", lambda theirs: theirs["hidden_size"])},
            ),
            CHANNEL: Table(
                {"mixer.kind": "channel_mix", "mixer.gate": True},
                {"intermediate_size": width("mixer.expansion", lambda theirs: 4 * theirs["hidden_size"])},
            ),
        }
    }
    ignored_fields = "context_length rescale_every"  # rescaling only halves activations, which the norms undo
    embedding = "rwkv.embeddings.weight"
    norm = "rwkv.ln_out.weight"
    head = "head.weight"
    layers = "rwkv.blocks"

    def outer_tensors(self, model: LanguageModel) -> Layout:
        first = {f"embedding_norm.{kind}": f"{self.layers}.0.pre_ln.{kind}" for kind in ("weight", "bias")}
        return super().outer_tensors(model) | first | {"norm.bias": "rwkv.ln_out.bias"}

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        is_time_mixing = mixer.kind == "rwkv4"
        if is_time_mixing:
            prefix = "attention"
            d_model = len(mixer.mix_k)
        else:
            prefix = "feed_forward"
            d_model = mixer.shift.shape[1]

        def time_mix(name: str, rows: str) -> Part:
            return part(f"{prefix}.time_mix_{name}", 1, 1, d_model, pattern=f"1 1 d -> {rows}d")

        names = {"k": "key", "v": "value", "r": "receptance"}
        layout: Layout = {f"mixer.{letter}_proj.weight": f"{prefix}.{name}.weight" for letter, name in names.items()}
        layout |= {f"mixer_norm.{kind}": f"ln{1 if is_time_mixing else 2}.{kind}" for kind in ("weight", "bias")}
        if not is_time_mixing:
            return layout | {"mixer.shift": (time_mix("key", "1 "), time_mix("receptance", "1 "))}
        layout |= {f"mixer.{name}": f"{prefix}.{name}" for name in ("time_decay", "time_first")}
        layout |= {f"mixer.mix_{letter}": time_mix(name, "") for letter, name in names.items()}
        return layout | {"mixer.out_proj.weight": f"{prefix}.output.weight"}


class RWKV7(Halves):
    """RWKV-7 of fla."""

    name = "rwkv7"
    library = "fla"
    model_type = "rwkv7"
    class_name = "RWKV7ForCausalLM"
    common = Table(
        {"ffn": None, "norm.kind": "layernorm", "norm.bias": True},
        {
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "vocab_size": "vocab_size",
            "tie_word_embeddings": same("tie_embeddings", default=False),
            "norm_eps": same("norm.eps", default=1e-5),
            "embedding_norm": "embedding_norm",
            "norm_first": only(True),
            "norm_bias": only(True),
            "attn": only(None),
        },
    )
    kinds: ClassVar = {
        "layer_types": {
            TIME: Table(
                {"mixer.kind": "rwkv7"},
                {
                    "head_dim": Field(
                        ("mixer.n_heads",),
                        read=lambda size, theirs: theirs["hidden_size"] // size,
                        write=lambda heads, ours: ours["d_model"] // heads,
                    ),
                    "norm_eps": same("norm.eps", "mixer.norm_eps", default=1e-5),
                    **{f"{name}_low_rank_dim": same("mixer.rank", default=64) for name in ("decay", "a")},
                    "v_low_rank_dim": same(
                        "mixer.value_rank", default=16, write=lambda rank, ours: rank or ours["mixer.rank"]
                    ),
                    "gate_low_rank_dim": same(
                        "mixer.gate_rank", default=128, write=lambda rank, ours: rank or 2 * ours["mixer.rank"]
                    ),
                    # without fuse_norm, fla normalises keys without an eps
                    "fuse_norm": same(
                        "mixer.key_eps",
                        default=True,
                        read=lambda fused, _: 1e-6 if fused else 1e-24,
                        write=lambda eps, _: eps == 1e-6,
                    ),
                },
            ),
            CHANNEL: Table(
                {"mixer.kind": "channel_mix", "mixer.gate": False},
                {
                    "hidden_act": only("sqrelu"),
                    "intermediate_size": width(
                        "mixer.expansion",
                        lambda theirs: -(-int(theirs["hidden_size"] * (theirs.get("hidden_ratio") or 4)) // 32) * 32,
                    ),
                },
            ),
        }
    }
    ignored_fields = "attn_mode fuse_cross_entropy fuse_linear_cross_entropy use_l2warp hidden_ratio num_heads"
    embedding = "model.embeddings.weight"
    layers = "model.layers"

    def expand_fields(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        values = {"head_dim": 64, **{name: x for name, x in values.items() if x is not None}}
        value_dims = values.pop("value_dim", None)
        for size in value_dims if isinstance(value_dims, list) else [value_dims]:
            if size not in (None, values.get("hidden_size")):
                raise unsupported_value(where, "value_dim", size, "equal to hidden_size")
        decay_rank = values.get("decay_low_rank_dim", 64)
        rate_rank = values.get("a_low_rank_dim", 64)
        if decay_rank != rate_rank:
            raise unsupported_value(where, "a_low_rank_dim", rate_rank, f"equal to decay_low_rank_dim, {decay_rank},")
        return super().expand_fields(values, where) | {"embedding_norm": NORM | {"eps": values.get("norm_eps", 1e-5)}}

    def collapse_fields(self, values: dict[str, Any]) -> dict[str, Any]:
        del values["embedding_norm"]
        return super().collapse_fields(values)

    def outer_tensors(self, model: LanguageModel) -> Layout:
        first = {f"embedding_norm.{kind}": f"{self.layers}.0.pre_norm.{kind}" for kind in ("weight", "bias")}
        return super().outer_tensors(model) | first | {"norm.bias": "model.norm.bias"}

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        if mixer.kind == "channel_mix":
            d_model = mixer.shift.shape[1]
            layout: Layout = {f"mixer_norm.{kind}": f"ffn_norm.{kind}" for kind in ("weight", "bias")}
            layout |= {"mixer.k_proj.weight": "ffn.key.weight", "mixer.v_proj.weight": "ffn.value.weight"}
            return layout | {"mixer.shift": part("ffn.x_k", d_model, pattern="d -> 1 d")}
        heads = mixer.n_heads
        d_model = mixer.out_proj.in_features

        def by_head(name: str) -> Part:
            return part(f"attn.{name}", d_model, pattern="(h k) -> h k", h=heads)

        layout = {f"mixer_norm.{kind}": f"attn_norm.{kind}" for kind in ("weight", "bias")}
        token_shifts = (part(f"attn.x_{name}", 1, 1, d_model, pattern="1 1 d -> 1 d") for name in "rwkvag")
        projections = (part(f"attn.{name}_proj.weight", d_model, d_model) for name in "rkv")
        layout |= {"mixer.convolution.weight": tuple(token_shifts), "mixer.in_proj.weight": tuple(projections)}
        layout |= {"mixer.out_proj.weight": "attn.o_proj.weight", "mixer.norm.bonus": "attn.r_k"}
        layout |= {"mixer.removed": by_head("k_k"), "mixer.replaced": by_head("k_a")}
        layout |= {f"mixer.norm.{kind}": by_head(f"g_norm.{kind}") for kind in ("weight", "bias")}
        low_rank_maps = {"decay_proj": "w", "rate_proj": "a", "gate_proj": "g"}
        if mixer.value_proj:
            low_rank_maps["value_proj"] = "v"
        for ours, theirs in low_rank_maps.items():
            layout[f"mixer.{ours}.down.weight"] = f"attn.{theirs}_lora.lora.0.weight"
            layout[f"mixer.{ours}.up.weight"] = f"attn.{theirs}_lora.lora.2.weight"
            if theirs != "g":
                layout[f"mixer.{ours}.up.bias"] = f"attn.{theirs}_lora.lora.2.bias"
        return layout
