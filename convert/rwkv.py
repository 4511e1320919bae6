"""RWKV-4 of transformers: each of its layers is two here, time mixing and channel mixing."""

from collections.abc import Mapping
from typing import Any, ClassVar

from ..blocks import Block
from ..models import LanguageModel
from ..registry import SeqmixError
from .architecture import Architecture, Layout
from .fields import Table, only, same, width
from .layout import Part, part

TIME, CHANNEL = "time", "channel"
NORM = {"kind": "layernorm", "eps": 1e-5, "bias": True}


class Halves(Architecture):
    """An architecture whose layers are blocks of two alternating kinds here."""

    types: ClassVar[str] = "layer_types"
    halves: ClassVar[tuple[str, str]] = (TIME, CHANNEL)

    def unfolded(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        n_layers = values.get("num_hidden_layers", 0)
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

    name, model_type, class_name = "rwkv4", "rwkv", "RwkvForCausalLM"
    common = Table(
        {"ffn": None, "embedding_norm": NORM, **{f"norm.{name}": value for name, value in NORM.items()}},
        {
            **{"hidden_size": "d_model", "num_hidden_layers": "n_layers", "vocab_size": "vocab_size"},
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
    embedding, norm, head = "rwkv.embeddings.weight", "rwkv.ln_out.weight", "head.weight"
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
