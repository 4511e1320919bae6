"""A field that holds a configuration of some family: how pydantic checks it, writes it, and describes it.

The union of a family's kinds is formed when a value is checked, not when a class is made: pydantic's own unions cannot
grow with plug-ins.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Protocol

from pydantic import GetJsonSchemaHandler, SerializerFunctionWrapHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from .config import Config
from .errors import ConfigError
from .providers import kind_of, path_of


class Kinds(Protocol):
    """What a field needs to know of a registry."""

    @property
    def base(self) -> type[Config]:
        """The class that every configuration of the family extends."""
        ...

    @property
    def default_kind(self) -> str | None:
        """The kind of a mapping that says none."""
        ...

    def kinds(self) -> list[str]:
        """The kinds that can be had."""
        ...

    def resolve(self, kind: str) -> type[Config]:
        """The class of a kind or a dotted path; a ConfigError if there is none."""
        ...


DEFAULT_KIND = "x-default-kind"
"""The key of a JSON schema that names the kind of a mapping without one."""

_describing: ContextVar[tuple[Kinds, ...]] = ContextVar("_describing", default=())
"""The families whose JSON schema is being made."""


def checked(kinds: Kinds) -> CoreSchema:
    """The core schema of a field: takes instances as they are, and mappings by their kind."""

    def validate(value: Any, info: core_schema.ValidationInfo) -> Config:
        if isinstance(value, kinds.base):
            return value
        config = _class_of(value, kinds)
        return config.model_validate({**value, "kind": kind_of(config)}, context=info.context)

    def serialize(value: Config, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # whatever a caller leaves out: without its kind the value could not be read again
        return {**handler(value), "kind": _kind_to_write(type(value), kinds)}

    # any_schema: with the fields of the value's own class, not of the base
    serialization = core_schema.wrap_serializer_function_ser_schema(serialize, schema=core_schema.any_schema())
    return core_schema.with_info_plain_validator_function(validate, serialization=serialization)


def described(kinds: Kinds, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
    """The JSON schema of a field: one of all kinds, told apart by `kind`, or anything of a dotted path."""
    configs = {kind: kinds.resolve(kind).__pydantic_core_schema__ for kind in kinds.kinds()}
    outer = _describing.get()
    if kinds in outer:  # a kind that holds kinds of its own family: they are being described already
        configs = {kind: core_schema.definition_reference_schema(_ref(config)) for kind, config in configs.items()}
    token = _describing.set((*outer, kinds))
    try:
        union = handler(core_schema.tagged_union_schema(dict(configs), discriminator="kind"))
    finally:
        _describing.reset(token)
    by_path = {"type": "object", "properties": {"kind": {"type": "string", "pattern": ":"}}, "required": ["kind"]}
    default = {} if kinds.default_kind is None else {DEFAULT_KIND: kinds.default_kind}
    return {**union, **default, "oneOf": [*union["oneOf"], by_path]}


def _class_of(value: Any, kinds: Kinds) -> type[Config]:
    if not isinstance(value, Mapping):
        raise PydanticCustomError("mapping_with_kind", "Input should be a mapping with a kind")
    kind = value.get("kind", kinds.default_kind)
    if kind is None and "kind" not in value:
        sentence = f"missing key 'kind'; allowed: {', '.join(kinds.kinds())}"
        raise PydanticCustomError("missing_kind", "{sentence}", {"sentence": sentence})
    if not isinstance(kind, str):
        raise _error_at_kind(kind, "string_type")
    try:
        return kinds.resolve(kind)
    except ConfigError as error:
        raise _error_at_kind(kind, "value_error", error=error) from error


def _error_at_kind(kind: Any, error_type: str, **context: Any) -> ValidationError:
    details = InitErrorDetails(type=error_type, loc=("kind",), input=kind, ctx=context)
    return ValidationError.from_exception_data("kind", [details])


def _kind_to_write(config: type[Config], kinds: Kinds) -> str:
    """A class's kind, or its dotted path where that kind does not lead to it."""
    kind = kind_of(config)
    try:
        return kind if kinds.resolve(kind) is config else path_of(config)
    except ConfigError:
        return path_of(config)


def _ref(config: Any) -> str:
    """The name under which a configuration's core schema is defined."""
    schema = config["schema"] if config["type"] == "definitions" else config
    return schema["schema_ref"] if schema["type"] == "definition-ref" else schema["ref"]
