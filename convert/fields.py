"""Fields of another library's configuration and fields here, stated once and read in both directions."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..mixers.contract import IMPLEMENTATION_FIELDS
from ..models import ModelConfig, build_meta
from ..registry import SeqmixError
from ..registry.errors import shown

Values = Mapping[str, Any]
REQUIRED: Any = object()

HARMLESS = """
    _name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward dtype eos_token_id id2label
    initializer_range is_encoder_decoder label2id max_position_embeddings model_max_length model_type
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type return_dict
    router_aux_loss_coef torch_dtype transformers_version use_cache
"""
"""Fields of theirs that do not change what a trained model computes, whatever the architecture."""
SHAPES = """
    expansion expand expand_k expand_v multiple_of head_dim n_kv_heads n_qk_heads gate_rank value_rank dt_rank
    kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim shared_expansion
"""
"""Fields here that only say how wide tensors are: the tensors' shapes are compared instead."""
TRAINING = {*IMPLEMENTATION_FIELDS, "time_step_range", "a_range", "balance_rate", "dropout"}
"""Fields here that a trained model's function does not depend on."""


@dataclass(frozen=True)
class Field:
    """One of their fields: what it is here."""

    paths: tuple[str, ...]
    """Fields here with its value: of the model, or, after `mixer.`, `ffn.` or `block.`, of a block; `norm.` is all."""
    default: Any = REQUIRED
    """Its value where it is missing or null; a function makes it of the other fields."""
    read: Callable[[Any, Values], Any] = lambda value, _: value
    """The value here, of theirs and all their fields."""
    write: Callable[[Any, Values], Any] = lambda value, _: value
    """Their value, of the value here and all fields here by path."""
    allowed: tuple[Any, ...] | None = None
    """Their values that have a counterpart here; None for any."""


def same(*paths: str, default: Any = REQUIRED, **how: Any) -> Field:
    """A field with the same value here."""
    return Field(paths, default, **how)


def only(value: Any, *more: Any) -> Field:
    """A field that has no counterpart here but for these values, the first of which is its default."""
    return Field((), value, allowed=(value, *more))


def choice(path: str, values: Mapping[Any, Any], default: Any = REQUIRED) -> Field:
    """A field whose values have other names here; of several for one here, the first is written."""
    back = {here: theirs for theirs, here in reversed(list(values.items()))}
    return Field(
        (path,),
        default,
        lambda value, _: values[value],
        lambda value, _: back.get(value, value),
        tuple(values),
    )


def width(path: str, default: Any = REQUIRED, over: str = "hidden_size") -> Field:
    """A width, which is here a multiple of d_model."""
    read = lambda value, theirs: value / theirs[over]  # noqa: E731
    return Field((path,), default, read, lambda value, ours: round(value * ours["d_model"]))


def head_size(*paths: str, heads: str, of: str = "mixer.n_heads", **default: Any) -> Field:
    """The width of a head, which is here that of all heads over d_model; `heads` is their number, `of` here."""
    read = lambda size, theirs: size * theirs[heads] / theirs["hidden_size"]  # noqa: E731
    return Field(paths, read=read, write=lambda value, ours: round(value * ours["d_model"]) // ours[of], **default)


@dataclass(frozen=True)
class Table:
    """What is always so here, and their fields."""

    ours: Values = field(default_factory=dict)
    theirs: Mapping[str, str | Field] = field(default_factory=dict)

    def __or__(self, other: "Table") -> "Table":
        return Table({**self.ours, **other.ours}, {**self.theirs, **other.theirs})

    @property
    def fields(self) -> dict[str, Field]:
        """Their fields by name."""
        return {name: same(x) if isinstance(x, str) else x for name, x in self.theirs.items()}

    def read(self, values: Values, where: object) -> dict[str, Any]:
        """Fields here by path.

        Raises:
            SeqmixError: one of theirs is missing, or has a value that has no counterpart here.
        """
        found = dict(self.ours)
        for name, spec in self.fields.items():
            try:
                if (value := values.get(name)) is None:
                    value = spec.default(values) if callable(spec.default) else spec.default
                if value is REQUIRED:
                    raise KeyError(name)
                if spec.allowed is not None and value not in spec.allowed:
                    raise refusal(where, name, value, " or ".join(map(shown, spec.allowed)))
                found |= dict.fromkeys(spec.paths, spec.read(value, values) if spec.paths else None)
            except KeyError as error:  # its own, or one that it is computed of
                raise SeqmixError(f"{where} lacks {error.args[0]}") from error
        return found

    def write(self, ours: Values) -> dict[str, Any]:
        """Their fields, of those here by path."""
        return {name: spec.write(ours[spec.paths[0]], ours) for name, spec in self.fields.items() if spec.paths}

    def matches(self, ours: Values) -> bool:
        """Whether fields here are what is always so."""
        return all(ours.get(path, REQUIRED) == value for path, value in self.ours.items())


def refusal(where: object, name: str, value: Any, allowed: str) -> SeqmixError:
    """The error for a value of theirs that has no counterpart here."""
    return SeqmixError(f"{where} has {name} = {shown(value)}; what has a counterpart here is {allowed}")


def require_known(values: Values, known: set[str], where: object) -> None:
    """Refuse fields of theirs that nothing has read.

    Raises:
        SeqmixError: there is one that is not null.
    """
    for name in sorted(values.keys() - known - set(HARMLESS.split())):
        if values[name] is not None:
            raise SeqmixError(
                f"{where} has {name} = {shown(values[name])}, a field that is not known here: remove it if it does not "
                "change what the model computes"
            )


def flat(m: ModelConfig, layer: str) -> dict[str, Any]:
    """Fields of a model and one of its blocks by the paths of `Field`; numbers of heads are resolved."""
    ffn = m.blocks[layer].ffn
    block = m.blocks[layer].model_dump(mode="json")
    found = m.model_dump(mode="json", exclude={"blocks", "pattern", "norm", "init", "dropout"})
    parts = {"mixer": block.pop("mixer"), "ffn": block.pop("ffn"), "norm": block.pop("norm"), "block": block}
    for name, fields in parts.items():
        found |= {name: None} if fields is None else {f"{name}.{each}": value for each, value in fields.items()}
    for name in ("mixer.n_kv_heads", "mixer.n_qk_heads"):
        if name in found:
            found[name] = found[name] or found["mixer.n_heads"]
    if ffn is not None:
        found["ffn.expansion"] = ffn.hidden_width(m.d_model) / m.d_model
    return found


def nested(found: Values) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's own fields and its block's, of fields by path."""
    model: dict[str, Any] = {}
    block: dict[str, Any] = {}
    for path, value in found.items():
        part, _, name = path.rpartition(".")
        if part in ("", "norm") and path != "ffn":
            (model.setdefault(part, {}) if part else model)[name] = value
        if part == "block" or path == "ffn":
            block[name] = value
        elif part:
            block.setdefault(part, {})[name] = value
    return model, block


def require_same(ours: ModelConfig, again: ModelConfig, name: str) -> None:
    """Refuse a model that an architecture changes on the way there and back.

    Raises:
        SeqmixError: the first field, or the first tensor's shape, that differs.
    """
    mine = _function(ours)
    other = _function(again)
    for path in sorted((*mine, *other), key=lambda path: not path.endswith("kind")):
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
    return dict(_leaves(dumped, "model.")) | dict(_leaves(layers, ""))


def _leaves(tree: Values, at: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{at}{name}.")
        elif name not in TRAINING and name not in SHAPES.split():
            yield f"{at}{name}", round(value, 12) if isinstance(value, float) else value
