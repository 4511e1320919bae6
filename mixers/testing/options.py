"""The options of a configuration that a check varies.

Literals and booleans are tried in every value, `X | None` in None too. Of numbers there is no telling which are
sensible: a field's `examples` (pydantic's own) say so, and come before anything else.
"""

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st
from pydantic import ValidationError

from ...registry import SeqmixError
from ..base import MixerConfig

FIXED = {"kind", "paradigm", "chunk_size", "backend"}
"""Not options: how a map is computed, which has checks of its own."""

CHUNK_SIZES = (3, 1, 2, 4, 7, 64)


def alternatives(config: MixerConfig) -> dict[str, list[Any]]:
    """Values to try for each field, beside the one it has."""
    found: dict[str, list[Any]] = {}
    for name, field in type(config).model_fields.items():
        if name in FIXED:
            continue
        values = [*(field.examples or []), *_values(field.annotation)]
        if values := [value for value in values if value != getattr(config, name)]:
            found[name] = values
    return found


def strategy(config: MixerConfig, *, vary: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Changes of the configuration: any few fields, and a chunk size small enough for short segments.

    A shrunk case changes nothing but the chunk size.
    """
    chunks = {"chunk_size": st.sampled_from(CHUNK_SIZES)} if "chunk_size" in type(config).model_fields else {}
    fields = {name: st.sampled_from(values) for name, values in alternatives(config).items()} if vary else {}
    unchanged = st.fixed_dictionaries(chunks)
    return st.one_of(unchanged, st.fixed_dictionaries(chunks, optional=fields)) if fields else unchanged


def changed(config: MixerConfig, options: dict[str, Any]) -> MixerConfig | None:
    """The configuration with other options; None where they do not go together."""
    try:
        return type(config).model_validate({**config.model_dump(), **options})
    except (ValidationError, SeqmixError):
        return None


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
