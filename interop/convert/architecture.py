"""Base class of an architecture of another library: tables of its fields, and the sources of its tensors."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ...blocks import Block
from ...models import LanguageModel, ModelConfig
from ...registry import SeqmixError, validated
from .fields import Table, flatten_config, require_known, require_same, unflatten_fields, unsupported_value
from .layout import Part, Rule, part
from .source_config import validate_types


class Joined(NamedTuple):
    """Source of a seqmix tensor: parts of the library's tensors, concatenated along any dimension but the first."""

    parts: tuple[Part, ...]
    """Parts, in their order in the seqmix tensor."""
    dim: int
    """Dimension along which the parts are concatenated."""


Source = str | Part | tuple[Part, ...] | Joined
"""Origin of a seqmix tensor: a tensor of the other library in the same shape, or parts that are concatenated. An empty
tuple means zeros."""
Layout = dict[str, Source]
"""Sources of tensors by their seqmix name. In the layout of a block, all names are relative to the layer."""


class Architecture:
    """An architecture of another library: how its configuration and tensors correspond to seqmix.

    A subclass sets the class variables and implements `block`.
    """

    name: ClassVar[str]
    """Name of the architecture in `seqmix convert --as`."""
    library: ClassVar[str] = "transformers"
    """Name of the library."""
    model_type: ClassVar[str | None]
    """Value of `model_type` in config.json; None if the library does not write one."""
    marker: ClassVar[str | None] = None
    """A field that distinguishes this architecture from another library's with the same `model_type`."""
    class_name: ClassVar[str]
    """Name of the library's model class with a language-model head."""
    common: ClassVar[Table]
    """Table of the model's fields and of the fields that all layers share."""
    kinds: ClassVar[Mapping[str, Mapping[str, Table]]] = {}
    """Tables of the fields of each kind of layer. The outer key is a field of config.json that has one entry per layer,
    such as `layer_types`; the inner key is the entry."""
    ignored_fields: ClassVar[str] = ""
    """Space-separated names of fields, besides `IGNORED_FIELDS`, that do not change what a trained model computes."""
    ignored_tensors: ClassVar[str] = r".*rotary_emb\.inv_freq"
    """Regular expression of names of tensors to ignore: buffers that the library can compute."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Parts of tensor names that other versions of the library write, each with the part that replaces it."""
    embedding = "model.embed_tokens.weight"
    """Name of the embedding's tensor."""
    norm = "model.norm.weight"
    """Name of the final norm's weight."""
    head = "lm_head.weight"
    """Name of the head's tensor."""
    layers = "model.layers"
    """Prefix of the names of all layers' tensors."""

    def block(self, block: Block) -> Layout:
        """Return the sources of a block's tensors, by their seqmix name relative to the block."""
        raise NotImplementedError

    def outer_tensors(self, model: LanguageModel) -> Layout:
        """Return the sources of the tensors outside the blocks (embedding, final norm, head), by their seqmix name."""
        del model
        return {"embedding.weight": self.embedding, "norm.weight": self.norm, "head.weight": self.head}

    def layer(self, index: int) -> int:
        """Return the index of the other library's layer to which the seqmix block `index` belongs."""
        return index

    def computed_tensors(self, model: LanguageModel) -> dict[str, Tensor]:
        """Return additional tensors to export, by the library's name: buffers that the library expects in the file."""
        return {}

    def file_tensors(self, theirs: Mapping[str, Tensor], model: LanguageModel) -> Mapping[str, Tensor]:
        """Return the tensors of a file in the shapes of the layout, if versions of the library save other shapes."""
        del model
        return theirs

    def tensor_aliases(self, values: Mapping[str, Any]) -> Mapping[str, str]:
        """Return the `aliases` that apply to a model with these fields in config.json."""
        del values
        return self.aliases

    def expand_fields(self, values: Mapping[str, Any], where: object) -> dict[str, Any]:
        """Return the fields of config.json in the form that the tables use, e.g. with one entry per layer."""
        return dict(values)

    def collapse_fields(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the fields that the tables use in the form of config.json: the inverse of `expand_fields`."""
        return values

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """True if these fields of config.json belong to this architecture."""
        return values.get("model_type") == self.model_type and (self.marker is None or self.marker in values)

    def config(self, values: Mapping[str, Any], where: object) -> ModelConfig:
        """Convert the fields of config.json to a model configuration.

        Args:
            values: the fields of config.json.
            where: name of the file in messages.

        Raises:
            SeqmixError: a field has the wrong type, or a value without a counterpart in seqmix.
        """
        values = self.expand_fields(validate_types(values, where), where)
        known = {*self.ignored_fields.split(), *self.kinds}
        types = [self._layer_types(name, values, where) for name in self.kinds]
        pattern = ["-".join(layer) for layer in zip(*types, strict=True)] or ["layer"]
        blocks = {}
        model = {}
        for label in dict.fromkeys(pattern):
            table = self.common
            for tables, kind in zip(self.kinds.values(), label.split("-"), strict=False):
                table |= tables[kind]
            model, blocks[label] = unflatten_fields(table.read(values, where))
        require_known(values, known | {name for table in self._tables() for name in table.theirs}, where)
        fields = {**model, "blocks": blocks, "pattern": pattern}
        return validated(ModelConfig, fields, f"{where} cannot be converted to a model of seqmix")

    def fields(self, m: ModelConfig) -> dict[str, Any]:
        """Convert a model configuration to the fields of config.json.

        Raises:
            SeqmixError: a field has no counterpart in this architecture; the message names the field.
        """
        written: dict[str, Any] = {name: [] for name in self.kinds}
        for label in m.layers:
            ours = flatten_config(m, label)
            table = self.common
            for name, tables in self.kinds.items():
                matching = (kind for kind, kind_table in tables.items() if kind_table.matches(ours))
                kind = next(matching, next(iter(tables)))
                table |= tables[kind]
                written[name].append(kind)
            if ours["mixer.kind"] != table.ours["mixer.kind"]:
                raise SeqmixError(
                    f"{self.name} models consist of {' and '.join(self.mixers)} layers, but model.blocks.{label}.mixer "
                    f"is {ours['mixer.kind']}"
                )
            try:
                written |= table.write(ours)
            except KeyError as error:  # e.g. a network of another kind, which lacks a field of the table
                raise SeqmixError(
                    f"model.blocks.{label} cannot be written as {self.name}: the block has no field {error}, which "
                    f"{self.name} needs"
                ) from error
        if self.model_type:
            written |= {"model_type": self.model_type, "architectures": [self.class_name]}
        written = self.collapse_fields(written)
        require_same(m, self.config(written, self.name), self.name)
        return written

    def rules(self, model: LanguageModel) -> Iterator[Rule]:
        """Return the rule of every tensor of a model.

        Raises:
            SeqmixError: a tensor has no counterpart in this architecture.
        """
        shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        layout = self.outer_tensors(model)
        if model.config.tie_embeddings:
            del layout["head.weight"], shapes["head.weight"]
        rules = {name: rule(name, source, shapes[name]) for name, source in layout.items()}
        for i, block in enumerate(model.blocks):
            for name, source in self.block(block).items():
                ours = f"blocks.{i}.{name}"
                rules[ours] = rule(ours, source, shapes[ours], f"{self.layers}.{self.layer(i)}.")
        if missing := shapes.keys() - rules.keys():
            raise SeqmixError(f"{self.name} models have no counterpart of the tensor {min(missing)}")
        return iter(rules.values())

    def _layer_types(self, name: str, values: Mapping[str, Any], where: object) -> list[str]:
        """Return the entries of a field that has one per layer, such as `layer_types`, after checking them."""
        types = values.get(name) or []
        for kind in types:
            if kind not in self.kinds[name]:
                raise unsupported_value(where, name, kind, " or ".join(self.kinds[name]))
        n_layers = self.common.read(values, where)["n_layers"]
        if len(types) != n_layers:
            raise SeqmixError(
                f"{where}: {name} must have one entry for each of the {n_layers} layers, got {len(types)}"
            )
        return types

    @property
    def mixers(self) -> list[str]:
        """Mixers of seqmix that layers of this architecture convert to."""
        return sorted({table.ours["mixer.kind"] for table in self._tables() if "mixer.kind" in table.ours})

    def _tables(self) -> Iterator[Table]:
        yield self.common
        for tables in self.kinds.values():
            yield from tables.values()


def rule(name: str, source: Source, shape: tuple[int, ...], prefix: str = "") -> Rule:
    """Make the rule that computes one seqmix tensor from its source.

    Args:
        name: name of the seqmix tensor.
        source: source of the tensor.
        shape: shape of the seqmix tensor.
        prefix: prefix of the other library's tensor names.
    """
    source, dim = source if isinstance(source, Joined) else (source, 0)
    if isinstance(source, str):
        parts = (part(source, *shape),)
    elif isinstance(source, Part):
        parts = (source,)
    else:
        parts = source
    prefixed = (Part(f"{prefix}{each.name}", each.shape, each.pattern, each.index, each.sizes) for each in parts)
    return Rule(name, shape, tuple(prefixed), dim)
