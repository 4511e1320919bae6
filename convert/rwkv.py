"""RWKV-4 of transformers and RWKV-7 of fla: each of their layers is two here, time mixing and channel mixing."""

from collections.abc import Mapping
from typing import Any, ClassVar

from ..blocks import Block
from ..models import LanguageModel
from ..registry import SeqmixError
from .architecture import Architecture, Layout
from .fields import Field, Table, only, refusal, same, width
from .layout import Part, part

TIME = "time"
CHANNEL = "channel"
NORM = {"kind": "layernorm", "eps": 1e-5, "bias": True}


class Halves(Architecture):
    """An architecture whose layers are blocks of two alternating kinds here."""

    types: ClassVar[str] = "layer_types"
    halves: ClassVar[tuple[str, str]] = (TIME, CHANNEL)

    def unfolded(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        if (n_layers := values.get("num_hidden_layers")) is None:
            raise SeqmixError(f"{where} lacks num_hidden_layers")
        return {**values, "num_hidden_layers": 2 * n_layers, self.types: list(self.halves) * n_layers}

    def folded(self, values: dict[str, Any]) -> dict[str, Any]:
        types = values.pop(self.types)
        if types != list(self.halves) * (len(types) // 2):
            raise SeqmixError(f"{self.name} has alternating layers of {' and '.join(self.mixers)}")
        return values | {"num_hidden_layers": len(types) // 2}

    def layer(self, index: int) -> int:
        return index // 2


class RWKV4(Halves):
    """RWKV-4."""

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
            "layer_norm_epsilon": only(1e-5),  # the last norm has no field
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
    harmless = "context_length rescale_every"  # which halves what the norms undo
    embedding = "rwkv.embeddings.weight"
    norm = "rwkv.ln_out.weight"
    head = "head.weight"
    layers = "rwkv.blocks"

    def outside(self, model: LanguageModel) -> Layout:
        first = {f"embedding_norm.{kind}": f"{self.layers}.0.pre_ln.{kind}" for kind in ("weight", "bias")}
        return super().outside(model) | first | {"norm.bias": "rwkv.ln_out.bias"}

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        timed = mixer.kind == "rwkv4"
        at, d_model = ("attention", len(mixer.mix_k)) if timed else ("feed_forward", mixer.shift.shape[1])

        def mixture(name: str, rows: str) -> Part:
            return part(f"{at}.time_mix_{name}", 1, 1, d_model, pattern=f"1 1 d -> {rows}d")

        names = {"k": "key", "v": "value", "r": "receptance"}
        layout: Layout = {f"mixer.{each}_proj.weight": f"{at}.{name}.weight" for each, name in names.items()}
        layout |= {f"mixer_norm.{kind}": f"ln{1 if timed else 2}.{kind}" for kind in ("weight", "bias")}
        if not timed:
            return layout | {"mixer.shift": (mixture("key", "1 "), mixture("receptance", "1 "))}
        layout |= {f"mixer.{name}": f"{at}.{name}" for name in ("time_decay", "time_first")}
        layout |= {f"mixer.mix_{each}": mixture(name, "") for each, name in names.items()}
        return layout | {"mixer.out_proj.weight": f"{at}.output.weight"}


class RWKV7(Halves):
    """RWKV-7 as fla has it."""

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
                    # without it the norm of a key has nothing added to it
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
    harmless = "attn_mode fuse_cross_entropy fuse_linear_cross_entropy use_l2warp hidden_ratio num_heads"
    embedding = "model.embeddings.weight"
    layers = "model.layers"

    def unfolded(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        values = {"head_dim": 64, **{name: x for name, x in values.items() if x is not None}}
        wide = values.pop("value_dim", None)
        for size in wide if isinstance(wide, list) else [wide]:
            if size not in (None, values.get("hidden_size")):
                raise refusal(where, "value_dim", size, "hidden_size")
        decay, rate = (values.get(f"{name}_low_rank_dim", 64) for name in ("decay", "a"))
        if decay != rate:
            raise refusal(where, "a_low_rank_dim", rate, f"decay_low_rank_dim, {decay}")
        return super().unfolded(values, where) | {"embedding_norm": NORM | {"eps": values.get("norm_eps", 1e-5)}}

    def folded(self, values: dict[str, Any]) -> dict[str, Any]:
        del values["embedding_norm"]
        return super().folded(values)

    def outside(self, model: LanguageModel) -> Layout:
        first = {f"embedding_norm.{kind}": f"{self.layers}.0.pre_norm.{kind}" for kind in ("weight", "bias")}
        return super().outside(model) | first | {"norm.bias": "model.norm.bias"}

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
        mixtures = (part(f"attn.x_{name}", 1, 1, d_model, pattern="1 1 d -> 1 d") for name in "rwkvag")
        products = (part(f"attn.{name}_proj.weight", d_model, d_model) for name in "rkv")
        layout |= {"mixer.convolution.weight": tuple(mixtures), "mixer.in_proj.weight": tuple(products)}
        layout |= {"mixer.out_proj.weight": "attn.o_proj.weight", "mixer.norm.bonus": "attn.r_k"}
        layout |= {"mixer.removed": by_head("k_k"), "mixer.replaced": by_head("k_a")}
        layout |= {f"mixer.norm.{kind}": by_head(f"g_norm.{kind}") for kind in ("weight", "bias")}
        maps = {"decay_proj": "w", "rate_proj": "a", "gate_proj": "g"} | (
            {"value_proj": "v"} if mixer.value_proj else {}
        )
        for ours, theirs in maps.items():
            layout[f"mixer.{ours}.down.weight"] = f"attn.{theirs}_lora.lora.0.weight"
            layout[f"mixer.{ours}.up.weight"] = f"attn.{theirs}_lora.lora.2.weight"
            if theirs != "g":
                layout[f"mixer.{ours}.up.bias"] = f"attn.{theirs}_lora.lora.2.bias"
        return layout
