"""The JSON schema of a configuration file, for editors."""

from typing import Any

from .config import Config
from .registry import DEFAULT_KIND
from .sources import EXTENDS


def json_schema(cls: type[Config]) -> dict[str, Any]:
    """The JSON schema of files that `load` reads as this class, differences included.

    A file that extends another may leave out any key, so none is required, except `kind` where it tells which keys are
    allowed; and a mapping without `kind` changes the one that it extends.
    """
    schema = cls.model_json_schema()
    for definition in (schema, *schema.get("$defs", {}).values()):
        _require_only_kind(definition)
    for part in _parts(schema):
        if "discriminator" in part and "oneOf" in part:
            part["oneOf"].append(_without_kind(part, schema))
    extends = {"type": "string", "description": "The preset or file of which this file is a difference."}
    schema["properties"] = {EXTENDS: extends, **schema.get("properties", {})}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _without_kind(union: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A mapping that says no kind: it changes one of any kind, and editors propose the keys of the default one."""
    mapping: dict[str, Any] = {"type": "object", "not": {"required": ["kind"]}}
    if (kind := union.get(DEFAULT_KIND)) is not None:
        definition = schema["$defs"][union["discriminator"]["mapping"][kind].rpartition("/")[2]]
        mapping["properties"] = {key: value for key, value in definition["properties"].items() if key != "kind"}
    return mapping


def _require_only_kind(definition: dict[str, Any]) -> None:
    definition.pop("required", None)
    if "kind" in definition.get("properties", {}):
        definition["required"] = ["kind"]


def _parts(schema: Any) -> list[dict[str, Any]]:
    """All mappings inside of a schema, itself included."""
    if isinstance(schema, dict):
        return [schema, *(part for value in schema.values() for part in _parts(value))]
    if isinstance(schema, list):
        return [part for value in schema for part in _parts(value)]
    return []
