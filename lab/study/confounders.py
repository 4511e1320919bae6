"""Confounders of a comparison of two entries of a study: all that differs beside the thing compared.

An entry is compared with the study's subject. If the kinds of their mixers differ, the study compares the mixer: its
kind, with the options that only its own equations have. Otherwise it compares the fields that one of the two entries
sets; the kind of a part, such as a residual connection, stands for the options that only this kind has. Everything else
in which the two differ is listed beside the answer: the accessories of mixers, options that both mixers have, heads,
feed-forward networks, norms, sizes and training. The knob of `match` is not listed, as it is what makes costs equal.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ...mixers import MixerConfig
from ...mixers.base.contract import IMPLEMENTATION_FIELDS
from ...models import ModelConfig
from ...registry import Config
from ...training import RunConfig
from .config_differences import format_value, leaves
from .equal_options import mixers_of, set_options
from .results import ABSENT, Difference

ACCESSORIES = ("short_conv", "qk_norm", "gate", "head_norm", "positions")
"""Options that mixers have around their own equations."""
SYNONYMS = {"rotation": "positions"}
"""Other names of accessories in some mixers."""
BUILT_IN = " (built in)"
"""Ending of the value of an accessory that a mixer always has."""
OFF = (None, False, 0, "none")
"""Values of an accessory that turn it off; they count as equal, also to a mixer without the option (`ABSENT`)."""
OF_THE_MIXER = {"mixer.kind", "mixer.head_dim", *(f"mixer.{field}" for field in IMPLEMENTATION_FIELDS)}
"""Options of mixers of different kinds that are not listed: only rounding depends on the implementation, and a head
dimension shows in the number of heads."""
MIXER = "the mixer"


class Feature(NamedTuple):
    """Value of a field in an entry, as text and by its effect."""

    text: str
    effect: frozenset[str]
    """The distinct values, with `OFF` and `ABSENT` as one value: entries differ in effect if these sets differ."""
    is_derived: bool = False
    """True if no field has this value: it follows from the mixer and its other fields."""


def describe(config: RunConfig) -> dict[str, Feature]:
    """Return an entry's value of every field in which entries may differ, by name of the field."""
    model = config.model
    blocks = [model.blocks[name] for name in dict.fromkeys(model.layers)]
    mixers = mixers_of(model)
    options = [(mixer, {SYNONYMS.get(name, name): name for name in type(mixer).model_fields}) for mixer in mixers]
    features = {name: _accessory_of(model, name) for name in ACCESSORIES}
    modules = [_build(mixer, model) for mixer in mixers]
    silu = _accessory(
        [(mixer.kind, "silu" if _has_silu(module) else "none") for mixer, module in zip(mixers, modules, strict=True)]
    )
    features["qkv_activation"] = silu._replace(is_derived=True)
    heads = [getattr(module, "n_heads", None) for module in modules]
    if all(isinstance(number, int) for number in heads):
        texts = dict.fromkeys(map(str, heads))
        features["mixer.n_heads"] = Feature(" and ".join(texts), frozenset(texts), is_derived=True)
    values: dict[str, list[Any]] = {}
    for mixer, known in options:
        for accessory, name in known.items():
            if accessory not in ACCESSORIES:
                values.setdefault(f"mixer.{name}", []).append(getattr(mixer, name))
    for block in blocks:
        for name, part in (("ffn", block.ffn), ("norm", block.norm)):
            for path, value in _fields(name, part).items():
                values.setdefault(path, []).append(value)
        for path, value in _fields("block", block, exclude={"mixer", "ffn", "norm"}).items():
            values.setdefault(path, []).append(value)
    if len(set(model.layers)) > 1:
        kinds = [model.blocks[name].mixer.kind for name in model.layers]
        values["layers"] = [", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))]
    sizes = _fields("", model, exclude={"blocks", "pattern", "norm"}) | _fields("final_norm", model.norm)
    for path, value in (sizes | _fields("training", config.training)).items():
        values[path] = [value]
    for path, each in values.items():
        texts = dict.fromkeys(map(format_value, each))
        features[path] = Feature(" and ".join(texts), frozenset(texts))
    return features


def equal_options(
    configs: Mapping[str, RunConfig], fields: Collection[str], subject: str
) -> tuple[dict[str, Any], list[str]]:
    """Return options for a study's `equal` that make accessories of all entries equal, the subject's values first.

    Args:
        configs: configurations by entry.
        fields: fields in which entries differ from the subject.
        subject: the entry with which all others are compared.

    Returns:
        The options with their values, and those of the fields in which entries then no longer differ.
    """
    models = {name: config.model for name, config in configs.items()}
    options: dict[str, Any] = {}
    for option in filter(fields.__contains__, ACCESSORIES):
        own = [getattr(mixer, option) for mixer in mixers_of(models[subject]) if option in type(mixer).model_fields]
        for value in (*own, None, "none"):
            changed = {name: set_options(model, {option: value})[0] for name, model in models.items()}
            if len({_accessory_of(model, option).effect for model in changed.values()}) == 1:
                options[option] = value
                models = changed
                break
    if not options:
        return {}, []
    features = [describe(config.model_copy(update={"model": models[name]})) for name, config in configs.items()]
    equal = [field for field in fields if len({each[field].effect for each in features if field in each}) == 1]
    return options, [field for field in equal if all(field in each for each in features)]


def _accessory_of(model: ModelConfig, accessory: str) -> Feature:
    """Return the feature of a model for one accessory of its mixers."""
    return _accessory([(mixer.kind, _value_of(mixer, accessory)) for mixer in mixers_of(model)])


def _accessory(values: Sequence[tuple[str, Any]]) -> Feature:
    """Return an entry's feature for one accessory; `values` are pairs of a mixer's kind and its value."""
    kinds: dict[str, list[str]] = {}
    effect: set[str] = set()
    for kind, value in values:
        kinds.setdefault(format_value(value), []).append(kind)
        effect.add("none" if value in (*OFF, ABSENT) else format_value(value).removesuffix(BUILT_IN))
    texts = (
        list(kinds) if len(kinds) == 1 else [f"{text} ({', '.join(dict.fromkeys(of))})" for text, of in kinds.items()]
    )
    return Feature(", ".join(texts), frozenset(effect))


def _value_of(mixer: MixerConfig, accessory: str) -> Any:
    """Return the value of an accessory of a mixer."""
    for name in type(mixer).model_fields:
        if SYNONYMS.get(name, name) == accessory:
            return getattr(mixer, name)
    built_in = type(mixer).built_in.get(accessory)
    return ABSENT if built_in is None else built_in + BUILT_IN


def _build(mixer: MixerConfig, model: ModelConfig) -> nn.Module:
    """Build a mixer as in the model's first layer, without memory for its parameters."""
    with torch.device("meta"):
        return mixer.build(model.d_model, layer_idx=0, n_layers=model.n_layers)


def _has_silu(mixer: nn.Module) -> bool:
    """True if silu follows the projections, with a short convolution before it or without."""
    convolution = getattr(mixer, "convolution", None)
    return getattr(convolution, "activation", None) == "silu" or getattr(mixer, "silu_without_conv", False)


def _fields(name: str, config: Config | None, exclude: Collection[str] = ()) -> dict[str, Any]:
    """Flatten the fields of a part of a configuration by dotted path; a part that is null has one field."""
    if config is None:
        return {name: None}
    fields = config.model_dump(mode="json", exclude=set(exclude))
    return leaves({name: fields} if name else fields)


def field_of(path: str) -> str:
    """Return the field of `describe` that a path of a configuration sets, such as model.blocks.ret.ffn.expansion."""
    top, *rest = path.split(".")
    if top == "training":
        return path
    if rest[:1] != ["blocks"]:
        return ".".join(["final_norm", *rest[1:]] if rest[:1] == ["norm"] else rest)
    inside = rest[2:]
    if inside[:1] == ["mixer"]:
        accessory = SYNONYMS.get(inside[-1], inside[-1])
        return accessory if accessory in ACCESSORIES else ".".join(inside)
    return ".".join(inside if inside[:1] in (["ffn"], ["norm"]) else ["block", *inside])


def compare(
    configs: Mapping[str, RunConfig],
    subject: str,
    named: Mapping[str, Collection[str]],
    ignored: Collection[str],
    variant: Mapping[str, Any],
) -> list[Difference]:
    """Compare all entries of a variant with the subject.

    Args:
        configs: configurations by entry.
        subject: the entry with which all others are compared.
        named: fields that each entry sets; a field "*" stands for the whole model.
        ignored: fields that are changed for matching, and those that are tuned.
        variant: the variant.
    """
    features = {name: describe(config) for name, config in configs.items()}
    differing_fields = {
        name: _difference(features[subject], features[name], {*named[subject], *named[name]}, ignored)
        for name in configs
    }
    shown = list(dict.fromkeys(field for _, also in differing_fields.values() for field in also))
    return [
        Difference(
            entry=name,
            variant=dict(variant),
            compared=tuple(compared),
            also=tuple(also),
            values={field: features[name][field].text if field in features[name] else ABSENT for field in shown},
        )
        for name, (compared, also) in differing_fields.items()
    ]


def _difference(
    one: Mapping[str, Feature], other: Mapping[str, Feature], named: Collection[str], ignored: Collection[str]
) -> tuple[list[str], list[str]]:
    """Return the fields that are compared, and all others in which two entries differ."""
    differing = [
        field
        for field in dict.fromkeys([*one, *other])
        if field not in ignored and (field not in one or field not in other or one[field].effect != other[field].effect)
    ]
    if "mixer.kind" in differing:
        of_mixer = ("mixer.", "layers")
        shared = [
            field
            for field in differing
            if field.startswith("mixer.") and field in one and field in other and field not in OF_THE_MIXER
        ]
        return [MIXER], [*(field for field in differing if not field.startswith(of_mixer)), *shared]
    # the options of a kind belong to it, such as residual.n_streams to residual.kind
    kinds = tuple(field.removesuffix("kind") for field in named if field.endswith(".kind") and field in differing)
    differing = [
        field
        for field in differing
        if not (field in one and one[field].is_derived)
        and (field in named or not field.startswith(kinds) or (field in one and field in other))
    ]
    whole = "*" in named
    compared = [field for field in differing if field in named or (whole and not field.startswith("training."))]
    return compared, [field for field in differing if field not in compared]
