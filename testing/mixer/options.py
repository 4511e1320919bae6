"""Options of a configuration that checks vary.

Every value of a Literal or a boolean is tried, and None for `X | None`. Numbers come from pydantic's `examples` of the
field, which are tried first, and from its bounds: somebody will set whatever a field allows. For a float without
examples or bounds, twice its value is tried by the checks that try every value.
"""

from collections.abc import Callable, Iterable
from itertools import permutations
from random import Random
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ...mixers.base.contract import MixerConfig
from ...mixers.base.traits import ContractError
from ...registry import Config, SeqmixError

FIXED = {"kind", "paradigm", "chunk_size", "backend"}
"""Fields that are not varied as options. They say how the map is computed, which other checks test."""

CHUNK_SIZES = (3, 1, 2, 4, 7, 64)
"""Chunk sizes to try. Small ones give short segments many chunks; those that the configuration refuses are skipped."""

BOUNDS = ("ge", "gt", "le", "lt")
"""pydantic's names for the bounds of a number."""

UNEVEN = 3
"""Value to try for an integer without a near upper bound: not a power of two."""

FAR = 64
"""Largest upper bound that is tried. A higher one only guards against mistakes, and would take too long to try."""


def alternatives(config: MixerConfig, *, with_guesses: bool = False) -> dict[str, list[Any]]:
    """Return the values to try for each field, other than its current one.

    Args:
        config: the configuration to vary.
        with_guesses: True to try twice the value of a float without examples or bounds, which may overflow 16 bits.
    """
    values_by_field: dict[str, list[Any]] = {}
    for name, field in type(config).model_fields.items():
        if name in FIXED or name in getattr(config, "not_varied", ()):
            continue
        current = getattr(config, name)
        values = [*(field.examples or []), *_enumerate_values(field.annotation), *_values_in_bounds(field, current)]
        if with_guesses and not values and isinstance(current, float):
            values.append(2 * current or 0.5)
        # several parts, such as the mixers of a hybrid: also try equal ones
        if isinstance(current, tuple) and current and isinstance(current[0], Config):
            values.append(current[:1] * len(current))
        # no set or dict here: a value may be a list, which the configuration converts to another type
        others = [value for n, value in enumerate(values) if value not in values[:n]]
        if others := [value for value in others if value != current and _converted(config, name, value) != current]:
            values_by_field[name] = others
    return values_by_field


def not_varied(config: MixerConfig) -> list[str]:
    """Return the fields for which no other value is known: integers without `examples` or bounds, text, lists."""
    varied, fields = alternatives(config, with_guesses=True), type(config).model_fields.items()
    fixed = FIXED | varied.keys()
    return [name for name, field in fields if name not in fixed and len(_enumerate_values(field.annotation)) != 1]


def chunk_sizes(
    config: MixerConfig,
    accepts: Callable[[dict[str, Any]], bool] | None = None,
    candidates: Iterable[int] = CHUNK_SIZES,
) -> list[Any]:
    """Return the chunk sizes that a configuration accepts; empty if it has no field `chunk_size`.

    Args:
        config: the configuration.
        accepts: returns True if a mixer can be built with these options; by default, if the configuration is valid.
        candidates: sizes to try, in addition to the current one and to those in the field's examples and type.
    """
    field = type(config).model_fields.get("chunk_size")
    if field is None:
        return []
    accepts = accepts or (lambda options: changed(config, options) is not None)
    current = vars(config)["chunk_size"]
    sizes = dict.fromkeys([*candidates, *(field.examples or []), *_enumerate_values(field.annotation), current])
    return [size for size in sizes if size == current or accepts({"chunk_size": size})]


def drawn_options(
    config: MixerConfig, *, vary: bool, accepts: Callable[[dict[str, Any]], bool] | None = None
) -> Callable[[Random, bool], dict[str, Any]]:
    """Return a function of a random generator and a flag that draws changes of a configuration.

    It draws a chunk size, often one that is small enough for short segments. If the flag is True, it may also change
    other fields.

    Args:
        config: the configuration to change.
        vary: False to draw chunk sizes alone.
        accepts: returns True if a mixer can be built with these options; by default, if the configuration is valid.
    """
    sizes, fields = chunk_sizes(config, accepts), alternatives(config) if vary else {}

    def draw(rng: Random, change_fields: bool) -> dict[str, Any]:
        options = {"chunk_size": rng.choice(sizes)} if sizes else {}
        chosen = [name for name in fields if rng.random() < 0.5] if change_fields and rng.random() < 0.5 else []
        return options | {name: rng.choice(fields[name]) for name in chosen}

    return draw


def single_changes(config: MixerConfig, accepts: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Return one change per value of every option: that value alone, or with one other value that it requires.

    If many options changed at once, the code path that each one takes alone would never run.
    """
    values, changes = _all_values(config), []
    for name, value in values:
        pairs = ({name: value, other_name: other} for other_name, other in values if other_name != name)
        changes += [options for options in ({name: value}, *pairs) if accepts(options)][:1]
    return changes


def shared_head_changes(config: MixerConfig, accepts: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Return changes in which groups of heads share something, such as keys and values.

    With one group, or one per head, a wrong mapping from heads to groups goes unnoticed.
    """
    names = [name for name in alternatives(config) if "heads" in name or "group" in name]
    sizes = ((4, 2), (6, 2), (6, 3), (8, 2), (12, 3))
    candidates = [[{many: n, few: groups} for n, groups in sizes] for many, few in permutations(names, 2)]
    return [options for of_pair in candidates for options in list(filter(accepts, of_pair))[:1]]


def _all_values(config: MixerConfig) -> list[tuple[str, Any]]:
    """Return name and value of every alternative, guessed ones included."""
    return [(name, value) for name, others in alternatives(config, with_guesses=True).items() for value in others]


def changed(config: MixerConfig, options: dict[str, Any]) -> MixerConfig | None:
    """Return the configuration with other options; None if it refuses the combination."""
    if not options:
        return config
    try:
        return type(config).model_validate({**config.model_dump(), **options})
    except (ValidationError, SeqmixError):
        return None


def require_examples(config: MixerConfig) -> None:
    """Check that every field accepts its own `examples`: a refused one would never be tried, and nobody would notice.

    Raises:
        ContractError: a field refuses one of its examples.
    """
    cls = type(config)
    for name, value in ((name, value) for name, field in cls.model_fields.items() for value in field.examples or []):
        try:
            cls.model_validate({**config.model_dump(), name: value})
        except SeqmixError:
            continue
        except ValidationError as error:
            # an error without a location is a rule about several fields: the value may be fine with others
            for detail in (detail for detail in error.errors() if detail["loc"][:1] == (name,)):
                accepted = f"{cls.__name__}: expected field {name} to accept its own example {value!r}"
                raise ContractError(f"{accepted}, got: {detail['msg']}; correct `examples`, or the field") from None


def _converted(config: MixerConfig, name: str, value: object) -> object:
    """Return a value as the configuration stores it; unchanged if the configuration refuses it."""
    other = changed(config, {name: value}) if isinstance(value, list | dict) else None
    return value if other is None else getattr(other, name)


def _values_in_bounds(field: FieldInfo, current: object) -> list[Any]:
    """Return numbers to try that follow from a field's bounds.

    With two bounds near each other: the middle, and each bound that is allowed itself. For an integer without a near
    upper bound: `UNEVEN`, or one less than a large current value.
    """
    if current is None and int in get_args(field.annotation):
        return [UNEVEN]
    if isinstance(current, bool) or not isinstance(current, int | float):
        return []
    bounds = {kind: getattr(part, kind) for part in field.metadata for kind in BOUNDS if hasattr(part, kind)}
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if isinstance(current, int) and low is not None and (high is None or high > FAR):
        # a large number may be a maximum position: a small one would refuse the segments of most checks
        return [UNEVEN if current <= FAR else current - 1]
    if low is None or high is None or high > FAR:
        return []
    middle = (low + high) // 2 if isinstance(current, int) else (low + high) / 2
    return [middle, *(bounds[kind] for kind in ("le", "ge") if kind in bounds)]


def _enumerate_values(annotation: Any) -> list[Any]:
    """Return all values of a Literal, a boolean or None, also within a union; none of any other type."""
    origin = get_origin(annotation)
    if origin is Literal:
        return list(get_args(annotation))
    if origin in (Union, UnionType):
        return [value for option in get_args(annotation) for value in _enumerate_values(option)]
    if annotation is bool:
        return [False, True]
    if annotation is NoneType:
        return [None]
    return []
