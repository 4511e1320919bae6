"""The base of every configuration."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from .errors import nearest


class Config(BaseModel):
    """A frozen value that is checked when it is made.

    Unknown keys are errors, and nothing is converted: `true` is no integer, and neither is "8". A string under a field
    is its documentation. Lists become tuples, since a frozen value holds nothing that can change: declare `tuple[...]`,
    not `list[...]`. A field whose type YAML cannot write (an enum, a path) takes `Field(strict=False)`.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,  # no size, rate or probability is infinite
    )

    @model_validator(mode="before")
    @classmethod
    def _read_mapping(cls, value: Any) -> Any:
        """Refuse unknown keys before anything else: a missing key may be no more than what a typo leaves behind."""
        if not isinstance(value, Mapping):
            return value
        allowed = [field.alias or name for name, field in cls.model_fields.items()]
        unknown = [
            InitErrorDetails(type=_unknown_key(key, allowed), loc=(str(key),), input=entry)
            for key, entry in value.items()
            if key not in allowed
        ]
        if unknown:
            raise ValidationError.from_exception_data(cls.__name__, unknown)
        return {key: _without_lists(entry) for key, entry in value.items()}


def _unknown_key(key: object, allowed: list[str]) -> PydanticCustomError:
    sentence = f"unknown key {key!r}; allowed: {', '.join(allowed)}{nearest(str(key), allowed)}"
    return PydanticCustomError("unknown_key", "{sentence}", {"sentence": sentence})


def _without_lists(value: Any) -> Any:
    """Plain data with tuples for lists; named tuples and other values of a class of their own stay as they are."""
    if type(value) in (list, tuple):
        return tuple(_without_lists(item) for item in value)
    if type(value) is dict:
        return {key: _without_lists(entry) for key, entry in value.items()}
    return value
