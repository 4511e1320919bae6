"""The base class of every configuration."""

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, dataclass_transform

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from .errors import ConfigError, choices_hint
from .explain import explain_fields
from .plug_in_errors import require_signatures


@dataclass_transform(kw_only_default=True, field_specifiers=(Field,))  # as pydantic declares its own metaclass
class _ConfigType(type(BaseModel)):
    """Metaclass of `Config`: turns errors of values that Python code passes into sentences.

    Values of files pass through `Config.model_validate`, which keeps pydantic's errors: `load` adds their lines.
    """

    def __call__(cls: Any, **fields: Any):
        try:
            # not super().__call__: the warning about a deprecated name counts the calls up to the program's line
            return cls.__pydantic_validator__.validate_python(fields)
        except ValidationError as error:
            raise ConfigError(explain_fields(error, fields, cls.__name__)) from error


class Config(BaseModel, metaclass=_ConfigType):
    """Base class of configurations: a frozen pydantic model, validated when it is created.

    Unknown keys are errors, and values are not converted: neither `true` nor "8" is an integer. A string under a field
    is its documentation. Lists become tuples, because a frozen value must not contain mutable ones: declare
    `tuple[...]`, not `list[...]`. A field whose type YAML cannot write (an enum, a path) needs `Field(strict=False)`.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,  # sizes, rates and probabilities are finite
    )

    deprecated_names: ClassVar[Mapping[str, str]] = {}
    """Deprecated field names, each with its current name: accepted for one minor version with a warning; inherited."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Check the class's methods, and merge its deprecated names with those it inherits."""
        super().__pydantic_init_subclass__(**kwargs)
        require_signatures(cls)
        by_class = [vars(base).get("deprecated_names", {}) for base in reversed(cls.__mro__)]
        cls.deprecated_names = {old: new for names in by_class for old, new in names.items()}

    @model_validator(mode="before")
    @classmethod
    def _read_mapping(cls, value: Any) -> Any:
        """Rename deprecated keys, and refuse unknown ones first: a typo would otherwise appear as a missing key."""
        if not isinstance(value, Mapping):
            return value
        allowed = [field.alias or name for name, field in cls.model_fields.items()]
        entries: dict[str, Any] = {}
        refused: list[InitErrorDetails] = []
        for key, entry in value.items():
            name = cls.deprecated_names.get(key, key)
            if name not in allowed:
                sentence = f"unknown key {key!r}{choices_hint(str(key), allowed)}"
                refused.append(InitErrorDetails(type=refusal(sentence), loc=(str(key),), input=value))
            elif name != key and name in value:
                sentence = f"{key!r} is the deprecated name of {name!r}, and both are given: remove {key!r}"
                refused.append(InitErrorDetails(type=refusal(sentence), loc=(key,), input=value))
            elif name != key:
                warnings.warn(deprecation(key, name), FutureWarning, stacklevel=3)
            entries[name] = _without_lists(entry)
        if refused:
            raise ValidationError.from_exception_data(cls.__name__, refused)
        return entries


def deprecation(old: str, new: str) -> str:
    """Return the text of the warning for a field that is set by its deprecated name `old`."""
    return f"{old} is deprecated, use {new}: the next minor version removes the old name"


def refusal(sentence: str) -> PydanticCustomError:
    """Return a pydantic error with this message, in which braces are literal text."""
    return PydanticCustomError("refused", "{sentence}", {"sentence": sentence})  # pyright: ignore[reportArgumentType]


def _without_lists(value: Any) -> Any:
    """Return plain data with tuples in place of lists; named tuples and other classes are left unchanged."""
    if type(value) in (list, tuple):
        return tuple(_without_lists(item) for item in value)
    if type(value) is dict:
        return {key: _without_lists(entry) for key, entry in value.items()}
    return value
