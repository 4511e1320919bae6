"""Options set to the same value in all mixers of a study (`equal`), such as short_conv: 4, and the mixers that cannot
take them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ...mixers import MixerConfig
from ...models import ModelConfig
from ...registry.explain import explain_fields
from .config_differences import format_value


@dataclass(frozen=True)
class Exempt:
    """A mixer that does not get the common value of an option of `equal`."""

    option: str
    mixer: str
    """Kind of the mixer."""
    reason: str | None
    """Reason why the mixer keeps its own value; None if it has no such option."""


def set_options(model: ModelConfig, options: Mapping[str, Any]) -> tuple[ModelConfig, list[Exempt]]:
    """Set options in the mixers of a model; also return the mixers that lack an option or refuse its value."""
    exempt: dict[Exempt, None] = {}
    blocks = dict(model.blocks)
    for name in dict.fromkeys(model.layers):
        mixer = blocks[name].mixer
        for option, value in options.items():
            mixer = _set_option(mixer, option, value, exempt)
        blocks[name] = blocks[name].model_copy(update={"mixer": mixer})
    return model.model_copy(update={"blocks": blocks}), list(exempt)


def _set_option(mixer: MixerConfig, option: str, value: Any, exempt: dict[Exempt, None]) -> MixerConfig:
    if inner := _inner(mixer):
        changed = tuple(_set_option(each, option, value, exempt) for each in inner)
        return mixer.model_copy(update={"mixers": changed})
    fields = {name: getattr(mixer, name) for name in type(mixer).model_fields}
    if option not in fields:
        exempt[Exempt(option, mixer.kind, None)] = None
        return mixer
    changes = fields | {option: value}
    try:
        return type(mixer).model_validate(changes)
    except ValidationError as error:
        why = explain_fields(error, changes, mixer.kind).splitlines()[0].removeprefix(f"{mixer.kind}: ")
        reason = f"keeps {format_value(fields[option])}: {why.removeprefix(f'{option}: ')}"
        exempt[Exempt(option, mixer.kind, reason)] = None
        return mixer


def mixers_of(model: ModelConfig) -> list[MixerConfig]:
    """Return the mixers of a model, one per block that its layers use; a combination counts as the mixers inside it."""
    return [each for name in dict.fromkeys(model.layers) for each in _flat(model.blocks[name].mixer)]


def _flat(mixer: MixerConfig) -> list[MixerConfig]:
    inner = _inner(mixer)
    return [leaf for part in inner for leaf in _flat(part)] if inner else [mixer]


def _inner(mixer: MixerConfig) -> tuple[MixerConfig, ...]:
    """Return the mixers inside a combination such as parallel_hybrid; () for any other mixer."""
    inner = getattr(mixer, "mixers", ())
    return inner if isinstance(inner, tuple) and all(isinstance(each, MixerConfig) for each in inner) else ()


def equal_sentences(options: Mapping[str, Any], exempt: Iterable[tuple[str, Exempt]]) -> Iterator[str]:
    """Yield a sentence for each option, with the entries that do not have it; `exempt` has pairs with entries."""
    for option, value in options.items():
        exceptions = dict.fromkeys(
            f"{entry if entry == each.mixer else f'{entry} ({each.mixer})'} "
            + (f"has no option {option}" if each.reason is None else each.reason)
            for entry, each in exempt
            if each.option == option
        )
        setting = f"{option} = {format_value(value)}"
        if exceptions:
            yield f"Equal in all mixers that allow it: {setting}; {'; '.join(exceptions)}."
        else:
            yield f"Equal in all mixers: {setting}."
