"""What a declaration of another library's architecture consists of, and the fields of its configuration."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..blocks import Block
from ..mixers.contract import IMPLEMENTATION_FIELDS
from ..models import LanguageModel, ModelConfig, build_meta
from ..registry import SeqmixError
from ..registry.errors import shown
from .layout import Part, Rule, part

Layout = dict[str, str | Part | tuple[Part, ...]]
"""Of a block, its tensors by name: a tensor of theirs in the same shape, or parts of several; relative to the layer."""

HARMLESS = """
    _name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward dtype eos_token_id id2label
    initializer_range is_encoder_decoder label2id max_position_embeddings model_max_length model_type
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type return_dict
    router_aux_loss_coef torch_dtype transformers_version use_cache
"""
"""Fields that every configuration may have and that do not change what a trained model computes."""
SHAPES = """
    expansion expand expand_k expand_v multiple_of head_dim n_kv_heads gate_rank dt_rank rank kv_lora_rank
    qk_nope_head_dim qk_rope_head_dim v_head_dim shared_expansion
"""
"""Fields here that only say how wide tensors are: the tensors' shapes are compared instead."""
TRAINING = {*IMPLEMENTATION_FIELDS, "time_step_range", "a_range", "balance_rate", "dropout"}
"""Fields here that a trained model's function does not depend on."""


class Fields:
    """The fields of another library's configuration, each of which has to be read or known to be harmless.

    Args:
        values: the fields.
        where: the file, as errors call it.
        harmless: names of further fields that do not matter.
    """

    def __init__(self, values: Mapping[str, Any], where: object, harmless: Collection[str] = ()) -> None:
        self.values, self.where = dict(values), where
        self.left = (
            {name for name, value in values.items() if value is not None} - set(HARMLESS.split()) - set(harmless)
        )

    def take(self, name: str, default: Any = ...) -> Any:
        """A field's value; null is its default.

        Raises:
            SeqmixError: it is missing and has no default.
        """
        self.left.discard(name)
        if (value := self.values.get(name)) is not None:
            return value
        if default is ...:
            raise SeqmixError(f"{self.where} lacks {name}")
        return default

    def only(self, **allowed: Any) -> None:
        """Refuse other values of fields than these (of a tuple, any; the first is the default).

        Raises:
            SeqmixError: a field has a value that has no counterpart here.
        """
        for name, values in allowed.items():
            choices = values if isinstance(values, tuple) else (values,)
            if (value := self.take(name, choices[0])) not in choices:
                raise self.refusal(name, value, " or ".join(map(shown, choices)))

    def refusal(self, name: str, value: Any, allowed: str) -> SeqmixError:
        """The error for a value that has no counterpart here."""
        return SeqmixError(f"{self.where} has {name} = {shown(value)}; what has a counterpart here is {allowed}")

    def done(self) -> None:
        """Refuse fields that nothing has read.

        Raises:
            SeqmixError: there is one.
        """
        for name in sorted(self.left):
            raise SeqmixError(
                f"{self.where} has {name} = {shown(self.values[name])}, a field that is not known here: remove it if "
                "it does not change what the model computes"
            )


class Architecture(ABC):
    """An architecture of another library: its configuration and its tensors, and what they are here."""

    name: ClassVar[str]
    """Its name in --as."""
    library: ClassVar[str]
    model_type: ClassVar[str | None]
    """Its `model_type` in config.json; None where there is none."""
    marker: ClassVar[str | None] = None
    """A field that tells it apart from another library's of the same model_type."""
    class_name: ClassVar[str]
    """Its class with a head."""
    mixers: ClassVar[tuple[str, ...]]
    """The mixers that it has here."""
    harmless: ClassVar[str] = ""
    """Names of fields that do not change what a trained model computes, beyond `HARMLESS`."""
    unread: ClassVar[str] = r".*rotary_emb\.inv_freq"
    """A regular expression of the names of tensors that carry nothing."""
    embedding, norm, head = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
    layers = "model.layers"

    @abstractmethod
    def read(self, c: Fields) -> dict[str, Any]:
        """The fields of a `ModelConfig`, from theirs."""

    @abstractmethod
    def write(self, m: ModelConfig) -> dict[str, Any]:
        """Their fields, from a `ModelConfig`: `convert` compares what `read` makes of them with it."""

    @abstractmethod
    def block(self, block: Block) -> Layout:
        """The tensors of a block."""

    def outside(self, model: LanguageModel) -> Layout:
        """The tensors outside of blocks."""
        head = {} if model.config.tie_embeddings else {"head.weight": self.head}
        return {"embedding.weight": self.embedding, "norm.weight": self.norm, **head}

    def derived(self, model: LanguageModel) -> dict[str, Tensor]:
        """Tensors that their code wants to read although it can compute them."""
        return {}

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a configuration is one of this architecture."""
        return config.get("model_type") == self.model_type and (self.marker is None or self.marker in config)

    def config(self, values: Mapping[str, Any], where: object) -> ModelConfig:
        """The model here that their configuration describes.

        Raises:
            SeqmixError: a field has no counterpart here.
        """
        fields = Fields(values, where, self.harmless.split())
        read = self.read(fields)
        fields.done()
        return ModelConfig.model_validate(read)

    def fields(self, m: ModelConfig) -> dict[str, Any]:
        """Their configuration of a model here.

        Raises:
            SeqmixError: the model has what the architecture has not, by the name of the field.
        """
        for name in dict.fromkeys(m.layers):
            if (kind := m.blocks[name].mixer.kind) not in self.mixers:
                raise SeqmixError(
                    f"{self.name} has layers of {' and '.join(self.mixers)}, and model.blocks.{name}.mixer is {kind}"
                )
        try:
            written = {"model_type": self.model_type, "architectures": [self.class_name]} if self.model_type else {}
            written |= self.write(m)
            again = self.config(written, self.name)
        except (AttributeError, KeyError) as error:  # a part of another kind, without a field that theirs has
            raise SeqmixError(f"the model has no counterpart in {self.name}: {error}") from error
        require_same(m, again, self.name)
        return written

    def rules(self, model: LanguageModel) -> Iterator[Rule]:
        """Where every tensor of a model comes from."""
        shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        layout = {name: _parts(source, "", shapes[name]) for name, source in self.outside(model).items()}
        for i, block in enumerate(model.blocks):
            for ours, source in self.block(block).items():
                full = f"blocks.{i}.{ours}"
                layout[full] = _parts(source, f"{self.layers}.{i}.", shapes[full])
        tied = {"head.weight"} if model.config.tie_embeddings else set()
        if lacking := shapes.keys() - layout.keys() - tied:
            raise SeqmixError(f"{self.name} has no counterpart of {min(lacking)}")
        return (Rule(name, shapes[name], parts) for name, parts in layout.items())


def _parts(source: str | Part | tuple[Part, ...], at: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """The parts of a tensor of this shape, with full names."""
    parts = (part(source, *shape),) if isinstance(source, str) else (source,) if isinstance(source, Part) else source
    return tuple(Part(f"{at}{each.name}", each.shape, each.pattern, each.index, each.sizes) for each in parts)


def require_same(ours: ModelConfig, again: ModelConfig, name: str) -> None:
    """Refuse a model that the architecture changes on the way there and back.

    Raises:
        SeqmixError: the first field, or the first tensor's shape, that differs.
    """
    mine, other = _function(ours), _function(again)
    for path in (*mine, *other):
        if mine.get(path) != other.get(path):
            raise SeqmixError(f"{path} is {shown(mine.get(path))}, and in {name} it is {shown(other.get(path))}")
    shapes, theirs = ({n: list(x.shape) for n, x in build_meta(m).state_dict().items()} for m in (ours, again))
    for tensor in (*shapes, *theirs):
        if shapes.get(tensor) != theirs.get(tensor):
            raise SeqmixError(f"{tensor} has shape {shapes.get(tensor)}, and in {name} it has {theirs.get(tensor)}")


def _function(m: ModelConfig) -> dict[str, Any]:
    """What a trained model's function depends on but for its widths, by dotted name, layer by layer."""
    dumped = m.model_dump(mode="json", exclude={"blocks", "pattern", "init", "dropout"})
    layers = {f"layer {i}": m.blocks[name].model_dump(mode="json") for i, name in enumerate(m.layers)}
    return dict(_flat(dumped, "model")) | dict(_flat(layers, ""))


def _flat(tree: Mapping[str, Any], at: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{at}.{name}" if at else name)
        elif name not in TRAINING and name not in SHAPES.split():
            yield f"{at}.{name}", round(value, 12) if isinstance(value, float) else value
