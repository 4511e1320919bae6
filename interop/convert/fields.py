"""Correspondences between fields of another library's configuration and of seqmix, applied in both directions."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...mixers.base.contract import IMPLEMENTATION_FIELDS
from ...models import ModelConfig, build_meta
from ...registry import SeqmixError
from ...registry.errors import shown

Values = Mapping[str, Any]
"""Values of fields, by name or by path."""
REQUIRED: Any = object()
"""Default of a field that must be present."""

IGNORED_FIELDS = """
    _name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward dtype eos_token_id id2label
    initializer_range is_encoder_decoder label2id max_position_embeddings model_max_length model_type
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type return_dict
    router_aux_loss_coef torch_dtype transformers_version use_cache
"""
"""Fields of config.json that do not change what a trained model computes, in any architecture."""
SHAPE_FIELDS = """
    expansion expand expand_k expand_v multiple_of head_dim n_kv_heads n_qk_heads gate_rank value_rank dt_rank
    kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim shared_expansion
"""
"""Fields of seqmix that only determine the widths of tensors: the tensors' shapes are compared instead."""
TRAINING_FIELDS = {*IMPLEMENTATION_FIELDS, "time_step_range", "a_range", "balance_rate", "dropout"}
"""Fields of seqmix that a trained model's outputs do not depend on."""


@dataclass(frozen=True)
class Field:
    """A field of config.json and the seqmix fields that it corresponds to."""

    paths: tuple[str, ...]
    """Paths of the seqmix fields: a field of the model, or, with the prefix `mixer.`, `ffn.` or `block.`, of a block;
    the prefix `norm.` means all norms. Empty if the field has no counterpart."""
    default: Any = REQUIRED
    """Value to use if the field is missing or null, or a function that computes it from all fields of config.json."""
    read: Callable[[Any, Values], Any] = lambda value, _: value
    """Function that computes the seqmix value from the field's value and all fields of config.json."""
    write: Callable[[Any, Values], Any] = lambda value, _: value
    """Function that computes the field's value from the seqmix value and all seqmix fields by path."""
    allowed: tuple[Any, ...] | None = None
    """Values of the field that have a counterpart in seqmix; None for any value."""


def same(*paths: str, default: Any = REQUIRED, **options: Any) -> Field:
    """Make a field whose value is the same in the seqmix fields at `paths`; `options` are attributes of `Field`."""
    return Field(paths, default, **options)


def only(value: Any, *others: Any) -> Field:
    """Make a field that has no counterpart because seqmix supports these values only; the first is the default."""
    return Field((), value, allowed=(value, *others))


def choice(path: str, values: Mapping[Any, Any], default: Any = REQUIRED) -> Field:
    """Make a field each of whose values corresponds to a differently named value in seqmix.

    `values` maps the field's values to those of seqmix. If several have the same seqmix value, the first is written.
    """
    inverse = {ours: theirs for theirs, ours in reversed(list(values.items()))}
    return Field(
        (path,),
        default,
        lambda value, _: values[value],
        lambda value, _: inverse.get(value, value),
        tuple(values),
    )


def width(path: str, default: Any = REQUIRED, over: str = "hidden_size") -> Field:
    """Make a field with a width, which seqmix states as a multiple of d_model.

    `over` is the name of the field of config.json that has d_model.
    """
    read = lambda value, theirs: value / theirs[over]  # noqa: E731
    return Field((path,), default, read, lambda value, ours: round(value * ours["d_model"]))


def head_size(*paths: str, heads: str, of: str = "mixer.n_heads", **default: Any) -> Field:
    """Make a field with the width of one head; seqmix states the width of all heads together, divided by d_model.

    Args:
        paths: paths of the seqmix fields.
        heads: field of config.json with the number of heads.
        of: path of the seqmix field with the number of heads.
        default: `default` of the field, if it has one.
    """
    read = lambda size, theirs: size * theirs[heads] / theirs["hidden_size"]  # noqa: E731
    return Field(paths, read=read, write=lambda value, ours: round(value * ours["d_model"]) // ours[of], **default)


@dataclass(frozen=True)
class Table:
    """A table of corresponding fields. `a | b` merges two tables; entries of b win."""

    ours: Values = field(default_factory=dict)
    """Seqmix fields, by path, that always have the same value in this architecture."""
    theirs: Mapping[str, str | Field] = field(default_factory=dict)
    """Fields of config.json, by name; a string is the path of a seqmix field with the same value."""

    def __or__(self, other: "Table") -> "Table":
        return Table({**self.ours, **other.ours}, {**self.theirs, **other.theirs})

    @property
    def fields(self) -> dict[str, Field]:
        """Fields of config.json, by name."""
        return {name: same(x) if isinstance(x, str) else x for name, x in self.theirs.items()}

    def read(self, values: Values, where: object) -> dict[str, Any]:
        """Compute the seqmix fields, by path, from the fields of config.json.

        Raises:
            SeqmixError: a field is missing, or has a value without a counterpart in seqmix.
        """
        ours = dict(self.ours)
        for name, spec in self.fields.items():
            try:
                if (value := values.get(name)) is None:
                    value = spec.default(values) if callable(spec.default) else spec.default
                if value is REQUIRED:
                    raise KeyError(name)
                if spec.allowed is not None and value not in spec.allowed:
                    raise unsupported_value(where, name, value, " or ".join(map(shown, spec.allowed)))
                ours |= dict.fromkeys(spec.paths, spec.read(value, values) if spec.paths else None)
            except KeyError as error:  # this field, or one that its value is computed from
                raise SeqmixError(f"{where} lacks {error.args[0]}") from error
        return ours

    def write(self, ours: Values) -> dict[str, Any]:
        """Compute the fields of config.json from the seqmix fields, by path."""
        return {name: spec.write(ours[spec.paths[0]], ours) for name, spec in self.fields.items() if spec.paths}

    def matches(self, ours: Values) -> bool:
        """True if these seqmix fields, by path, have all values that the table fixes (`ours`)."""
        return all(ours.get(path, REQUIRED) == value for path, value in self.ours.items())


def unsupported_value(where: object, name: str, value: Any, allowed: str) -> SeqmixError:
    """Return the error for a field of config.json whose value has no counterpart in seqmix."""
    return SeqmixError(f"{where}: {name} must be {allowed} to have a counterpart in seqmix, got {shown(value)}")


def require_known(values: Values, known: set[str], where: object) -> None:
    """Check that every field of config.json is known or ignored.

    Raises:
        SeqmixError: a field is neither, and is not null.
    """
    for name in sorted(values.keys() - known - set(IGNORED_FIELDS.split())):
        if values[name] is not None:
            raise SeqmixError(
                f"{where} has an unknown field, {name} = {shown(values[name])}: remove it if it does not change what "
                "the model computes"
            )


def flatten_config(m: ModelConfig, layer: str) -> dict[str, Any]:
    """Return the fields of a model and of one of its blocks, by path.

    Where `n_kv_heads` or `n_qk_heads` is not set, it becomes n_heads.
    """
    ffn = m.blocks[layer].ffn
    block = m.blocks[layer].model_dump(mode="json")
    ours = m.model_dump(mode="json", exclude={"blocks", "pattern", "norm", "init", "dropout"})
    parts = {"mixer": block.pop("mixer"), "ffn": block.pop("ffn"), "norm": block.pop("norm"), "block": block}
    for name, fields in parts.items():
        ours |= {name: None} if fields is None else {f"{name}.{each}": value for each, value in fields.items()}
    for name in ("mixer.n_kv_heads", "mixer.n_qk_heads"):
        if name in ours:
            ours[name] = ours[name] or ours["mixer.n_heads"]
    if ffn is not None:
        ours["ffn.expansion"] = ffn.hidden_width(m.d_model) / m.d_model
    return ours


def unflatten_fields(ours: Values) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split fields by path into the nested fields of a model and those of a block."""
    model: dict[str, Any] = {}
    block: dict[str, Any] = {}
    for path, value in ours.items():
        part, _, name = path.rpartition(".")
        if part in ("", "norm") and path != "ffn":
            (model.setdefault(part, {}) if part else model)[name] = value
        if part == "block" or path == "ffn":
            block[name] = value
        elif part:
            block.setdefault(part, {})[name] = value
    return model, block


def require_same(ours: ModelConfig, converted: ModelConfig, name: str) -> None:
    """Check that a model survives the conversion to an architecture and back.

    Args:
        ours: the model's configuration.
        converted: the configuration after conversion to the architecture and back.
        name: name of the architecture.

    Raises:
        SeqmixError: a field or a tensor's shape differs; the message names the first.
    """
    before = _function_fields(ours)
    after = _function_fields(converted)
    for path in sorted((*before, *after), key=lambda path: not path.endswith("kind")):
        if before.get(path) != after.get(path):
            raise SeqmixError(
                f"{name} cannot represent {path} = {shown(before.get(path))}: converting it gives "
                f"{shown(after.get(path))}"
            )
    shapes, shapes_after = (
        {n: list(x.shape) for n, x in build_meta(m).state_dict().items()} for m in (ours, converted)
    )
    for tensor in (*shapes, *shapes_after):
        if shapes.get(tensor) != shapes_after.get(tensor):
            raise SeqmixError(
                f"{name} cannot represent {tensor} of shape {shapes.get(tensor)}: converting it gives shape "
                f"{shapes_after.get(tensor)}"
            )


def _function_fields(m: ModelConfig) -> dict[str, Any]:
    """Return the fields on which a trained model's outputs depend, except widths, by path (`layer 0.norm.eps`)."""
    dumped = m.model_dump(mode="json", exclude={"blocks", "pattern", "init", "dropout"})
    layers = {f"layer {i}": m.blocks[name].model_dump(mode="json") for i, name in enumerate(m.layers)}
    return dict(_leaves(dumped, "model.")) | dict(_leaves(layers, ""))


def _leaves(tree: Values, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of every innermost field, without training fields and widths."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        elif name not in TRAINING_FIELDS and name not in SHAPE_FIELDS.split():
            yield f"{prefix}{name}", round(value, 12) if isinstance(value, float) else value
