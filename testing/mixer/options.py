"""The options of a configuration that a check varies.

Literals and booleans are tried in every value, `X | None` in None too. Numbers come from a field's `examples`
(pydantic's own), which are tried before anything else, and from its bounds: what a field allows, somebody sets. Of a
float that has neither, twice its value is tried where every value is.
"""

from collections.abc import Callable, Iterable
from itertools import permutations
from random import Random
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ...mixers.contract import MixerConfig
from ...mixers.traits import ContractError
from ...registry import Config, SeqmixError

FIXED = {"kind", "paradigm", "chunk_size", "backend"}
"""Not options: how a map is computed, which has checks of its own."""

CHUNK_SIZES = (3, 1, 2, 4, 7, 64)
"""Small ones, so that short segments have many chunks; those that the configuration refuses are left out."""

BOUNDS = ("ge", "gt", "le", "lt")
"""What numbers are declared with."""

UNEVEN = 3
"""A number that is no power of two."""

FAR = 64
"""An upper bound above it guards against mistakes, and costs too much to be tried."""


def alternatives(config: MixerConfig, *, guessed: bool = False) -> dict[str, list[Any]]:
    """Values to try for each field, beside the one it has; `guessed` of floats that name none too, twice of what they
    have, which may be too much for 16 bits."""
    values_by_field: dict[str, list[Any]] = {}
    for name, field in type(config).model_fields.items():
        if name in FIXED or name in getattr(config, "not_varied", ()):
            continue
        own = getattr(config, name)
        values = [*(field.examples or []), *_values(field.annotation), *_bounds(field, own)]
        values += [2 * own or 0.5] if guessed and not values and isinstance(own, float) else []
        # parts that are equal, as of a hybrid of mixers
        values += [own[:1] * len(own)] if isinstance(own, tuple) and own and isinstance(own[0], Config) else []
        # a value may be a list, which is not hashed, and which the configuration makes another type of
        others = [value for n, value in enumerate(values) if value not in values[:n]]
        if others := [value for value in others if value != own and _accepted(config, name, value) != own]:
            values_by_field[name] = others
    return values_by_field


def not_varied(config: MixerConfig) -> list[str]:
    """Fields of which no other value is known: integers without `examples` or bounds, text, lists."""
    varied, fields = alternatives(config, guessed=True), type(config).model_fields.items()
    return [name for name, x in fields if name not in FIXED | varied.keys() and len(_values(x.annotation)) != 1]


def chunk_sizes(
    config: MixerConfig,
    accepts: Callable[[dict[str, Any]], bool] | None = None,
    candidates: Iterable[int] = CHUNK_SIZES,
) -> list[Any]:
    """Chunk sizes that the configuration takes, and `accepts` too: the candidates, those its field names, its own."""
    field = type(config).model_fields.get("chunk_size")
    if field is None:
        return []
    accepts = accepts or (lambda options: changed(config, options) is not None)
    own = vars(config)["chunk_size"]
    sizes = dict.fromkeys([*candidates, *(field.examples or []), *_values(field.annotation), own])
    return [size for size in sizes if size == own or accepts({"chunk_size": size})]


def drawn_options(
    config: MixerConfig, *, vary: bool, accepts: Callable[[dict[str, Any]], bool] | None = None
) -> Callable[[Random, bool], dict[str, Any]]:
    """What draws changes of the configuration: any few fields, or none if there are to be no changes, and a chunk size
    small enough for short segments."""
    sizes, fields = chunk_sizes(config, accepts), alternatives(config) if vary else {}

    def draw(chance: Random, changes: bool) -> dict[str, Any]:
        options = {"chunk_size": chance.choice(sizes)} if sizes else {}
        few = [name for name in fields if chance.random() < 0.5] if changes and chance.random() < 0.5 else []
        return options | {name: chance.choice(fields[name]) for name in few}

    return draw


def singly(config: MixerConfig, accepts: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Each value by itself, or with the one other that it needs: among all others no plain path is taken."""
    values, changes = _all_values(config), []
    for one in values:
        few = ({one[0]: one[1]}, *({one[0]: one[1], other[0]: other[1]} for other in values if other[0] != one[0]))
        changes += [options for options in few if accepts(options)][:1]
    return changes


def shared(config: MixerConfig, accepts: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Heads that share something, neither one nor each for itself: which head reads which can be wrong there alone."""
    names = [name for name in alternatives(config) if "heads" in name or "group" in name]
    sizes = ((4, 2), (6, 2), (6, 3), (8, 2), (12, 3))
    candidates = [[{many: n, few: each} for n, each in sizes] for many, few in permutations(names, 2)]
    return [options for each in candidates for options in list(filter(accepts, each))[:1]]


def _all_values(config: MixerConfig) -> list[tuple[str, Any]]:
    return [(name, value) for name, others in alternatives(config, guessed=True).items() for value in others]


def changed(config: MixerConfig, options: dict[str, Any]) -> MixerConfig | None:
    """The configuration with other options; None where they do not go together."""
    if not options:
        return config
    try:
        return type(config).model_validate({**config.model_dump(), **options})
    except (ValidationError, SeqmixError):
        return None


def require_examples(config: MixerConfig) -> None:
    """Refuse a field whose own example it refuses: the value would never be tried, and nobody would know."""
    cls = type(config)
    for name, value in ((name, value) for name, field in cls.model_fields.items() for value in field.examples or []):
        try:
            cls.model_validate({**config.model_dump(), name: value})
        except SeqmixError:
            continue
        except ValidationError as error:
            # an error without a place is a rule about several fields: with others the value may do
            for detail in (detail for detail in error.errors() if detail["loc"][:1] == (name,)):
                refused = f"{cls.__name__}: field {name} refuses {value!r}, one of its own examples"
                raise ContractError(f"{refused}: {detail['msg']}") from None


def _accepted(config: MixerConfig, name: str, value: object) -> object:
    """A value as the configuration holds it; as it is where it does not go with the others."""
    other = changed(config, {name: value}) if isinstance(value, list | dict) else None
    return value if other is None else getattr(other, name)


def _bounds(field: FieldInfo, own: object) -> list[Any]:
    """Numbers between two bounds, which are there to be used, and a bound itself where it is allowed and near; where
    there is no upper bound, an integer that is no power of two, or one less of many."""
    if own is None and int in get_args(field.annotation):
        return [UNEVEN]
    if isinstance(own, bool) or not isinstance(own, int | float):
        return []
    bounds = {kind: getattr(part, kind) for part in field.metadata for kind in BOUNDS if hasattr(part, kind)}
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if isinstance(own, int) and low is not None and (high is None or high > FAR):
        # a large number may be that of positions, which texts need
        return [UNEVEN if own <= FAR else own - 1]
    if low is None or high is None or high > FAR:
        return []
    between = (low + high) // 2 if isinstance(own, int) else (low + high) / 2
    return [between, *(bounds[kind] for kind in ("le", "ge") if kind in bounds)]


def _values(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Literal:
        return list(get_args(annotation))
    if origin in (Union, UnionType):
        return [value for option in get_args(annotation) for value in _values(option)]
    if annotation is bool:
        return [False, True]
    if annotation is NoneType:
        return [None]
    return []
