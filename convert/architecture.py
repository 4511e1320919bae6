"""What a declaration of another library's architecture consists of: tables of fields, and where tensors come from."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..blocks import Block
from ..models import LanguageModel, ModelConfig
from ..registry import SeqmixError, validated
from .fields import Table, flat, nested, refusal, require_known, require_same
from .layout import Part, Rule, part
from .theirs import typed


class Joined(NamedTuple):
    """Parts along another dimension than the first."""

    parts: tuple[Part, ...]
    dim: int


Source = str | Part | tuple[Part, ...] | Joined
Layout = dict[str, Source]
"""Of a block, its tensors by name: a tensor of theirs in the same shape, or parts of several; relative to the layer.
No parts are zeros."""


class Architecture:
    """An architecture of another library: its configuration and its tensors, and what they are here."""

    name: ClassVar[str]
    """Its name in --as."""
    library: ClassVar[str] = "transformers"
    model_type: ClassVar[str | None]
    """Its `model_type` in config.json; None where there is none."""
    marker: ClassVar[str | None] = None
    """A field that tells it apart from another library's of the same model_type."""
    class_name: ClassVar[str]
    """Its class with a head."""
    common: ClassVar[Table]
    """The fields of the model and of all its layers."""
    kinds: ClassVar[Mapping[str, Mapping[str, Table]]] = {}
    """By the name of a field that has an entry for each layer: the fields of the layers with each of its values."""
    harmless: ClassVar[str] = ""
    """Names of fields that do not change what a trained model computes, beyond `HARMLESS`."""
    unread: ClassVar[str] = r".*rotary_emb\.inv_freq"
    """A regular expression of the names of tensors that carry nothing: buffers that their code computes."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Parts of names of tensors that other versions of their library write, and what they stand for."""
    embedding = "model.embed_tokens.weight"
    norm = "model.norm.weight"
    head = "lm_head.weight"
    layers = "model.layers"

    def block(self, block: Block) -> Layout:
        """The tensors of a block."""
        raise NotImplementedError

    def outside(self, model: LanguageModel) -> Layout:
        """The tensors outside of blocks."""
        del model
        return {"embedding.weight": self.embedding, "norm.weight": self.norm, "head.weight": self.head}

    def layer(self, index: int) -> int:
        """The index of their layer that a block here is of."""
        return index

    def derived(self, model: LanguageModel) -> dict[str, Tensor]:
        """Tensors that their code wants to read although it can compute them."""
        return {}

    def renamed(self, values: Mapping[str, Any]) -> Mapping[str, str]:
        """The aliases of a model with this configuration."""
        del values
        return self.aliases

    def unfolded(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        """Their fields as the tables have them."""
        return dict(values)

    def folded(self, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of the tables as they have them."""
        return values

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """Whether a configuration is one of this architecture."""
        return values.get("model_type") == self.model_type and (self.marker is None or self.marker in values)

    def config(self, values: Mapping[str, Any], where: object) -> ModelConfig:
        """The model here that their configuration describes.

        Raises:
            SeqmixError: a field has another type than theirs, or no counterpart here.
        """
        values = self.unfolded(typed(values, where), where)
        known = {*self.harmless.split(), *self.kinds}
        types = [self._types(name, values, where) for name in self.kinds]
        pattern = ["-".join(layer) for layer in zip(*types, strict=True)] or ["layer"]
        blocks = {}
        model = {}
        for label in dict.fromkeys(pattern):
            table = self.common
            for tables, kind in zip(self.kinds.values(), label.split("-"), strict=False):
                table |= tables[kind]
            model, blocks[label] = nested(table.read(values, where))
        require_known(values, known | {name for table in self._tables() for name in table.theirs}, where)
        fields = {**model, "blocks": blocks, "pattern": pattern}
        return validated(ModelConfig, fields, f"{where} describes no model here")

    def fields(self, m: ModelConfig) -> dict[str, Any]:
        """Their configuration of a model here.

        Raises:
            SeqmixError: the model has what the architecture has not, by the name of the field.
        """
        written: dict[str, Any] = {name: [] for name in self.kinds}
        for label in m.layers:
            ours = flat(m, label)
            table = self.common
            for name, tables in self.kinds.items():
                kind = next((kind for kind, each in tables.items() if each.matches(ours)), next(iter(tables)))
                table |= tables[kind]
                written[name].append(kind)
            if ours["mixer.kind"] != table.ours["mixer.kind"]:
                kinds = f"layers of {' and '.join(self.mixers)}"
                raise SeqmixError(f"{self.name} has {kinds}, and model.blocks.{label}.mixer is {ours['mixer.kind']}")
            try:
                written |= table.write(ours)
            except KeyError as error:  # a part of another kind, without a field that theirs has
                raise SeqmixError(
                    f"model.blocks.{label} has no counterpart in {self.name}: it lacks {error}"
                ) from error
        if self.model_type:
            written |= {"model_type": self.model_type, "architectures": [self.class_name]}
        written = self.folded(written)
        require_same(m, self.config(written, self.name), self.name)
        return written

    def rules(self, model: LanguageModel) -> Iterator[Rule]:
        """Where every tensor of a model comes from.

        Raises:
            SeqmixError: a tensor has no counterpart.
        """
        shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        layout = self.outside(model)
        if model.config.tie_embeddings:
            del layout["head.weight"], shapes["head.weight"]
        found = {name: rule(name, source, shapes[name]) for name, source in layout.items()}
        for i, block in enumerate(model.blocks):
            for name, source in self.block(block).items():
                ours = f"blocks.{i}.{name}"
                found[ours] = rule(ours, source, shapes[ours], f"{self.layers}.{self.layer(i)}.")
        if lacking := shapes.keys() - found.keys():
            raise SeqmixError(f"{self.name} has no counterpart of {min(lacking)}")
        return iter(found.values())

    def _types(self, name: str, values: Mapping[str, Any], where: object) -> list[str]:
        """The entries of a field that has one for each layer."""
        found = values.get(name) or []
        for kind in found:
            if kind not in self.kinds[name]:
                raise refusal(where, name, kind, " or ".join(self.kinds[name]))
        n_layers = self.common.read(values, where)["n_layers"]
        if len(found) != n_layers:
            raise SeqmixError(f"{where} has {n_layers} layers, and {name} has {len(found)} entries")
        return found

    @property
    def mixers(self) -> list[str]:
        """The mixers that its layers have here."""
        return sorted({table.ours["mixer.kind"] for table in self._tables() if "mixer.kind" in table.ours})

    def _tables(self) -> Iterator[Table]:
        yield self.common
        for tables in self.kinds.values():
            yield from tables.values()


def rule(name: str, source: Source, shape: tuple[int, ...], at: str = "") -> Rule:
    """The rule of an entry of a layout, whose names of theirs begin with `at`."""
    source, dim = source if isinstance(source, Joined) else (source, 0)
    parts = (part(source, *shape),) if isinstance(source, str) else (source,) if isinstance(source, Part) else source
    full = (Part(f"{at}{each.name}", each.shape, each.pattern, each.index, each.sizes) for each in parts)
    return Rule(name, shape, tuple(full), dim)
