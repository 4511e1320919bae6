"""The JSON schema of a configuration file, for editors."""

from collections.abc import Iterator
from typing import Any

from .config import Config
from .registry import DEFAULT_KIND
from .sources import EXTENDS


def json_schema(cls: type[Config]) -> dict[str, Any]:
    """Return the JSON schema of files that `load` reads as this class, with or without `extends`.

    A file that extends another may leave out any key, so only `kind` is required, where it decides which keys are
    allowed. A mapping without `kind` changes the mapping that it extends.
    """
    schema = cls.model_json_schema()
    for definition in (schema, *schema.get("$defs", {}).values()):
        definition.pop("required", None)
        if "kind" in definition.get("properties", {}):
            definition["required"] = ["kind"]
    for part in list(_parts(schema)):
        if "discriminator" in part and "oneOf" in part:
            part["oneOf"].append(_without_kind(part, schema))
    extends = {"type": "string", "description": "The preset or file from which this file differs."}
    schema["properties"] = {EXTENDS: extends, **schema.get("properties", {})}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _without_kind(union: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a mapping without a kind: any keys; editors suggest those of the default kind."""
    mapping: dict[str, Any] = {"type": "object", "not": {"required": ["kind"]}}
    if (kind := union.get(DEFAULT_KIND)) is not None:
        definition = schema["$defs"][union["discriminator"]["mapping"][kind].rpartition("/")[2]]
        mapping["properties"] = {key: value for key, value in definition["properties"].items() if key != "kind"}
    return mapping


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield all mappings in a schema, the schema itself included."""
    if isinstance(schema, dict):
        yield schema
    if isinstance(schema, dict | list):
        for part in schema.values() if isinstance(schema, dict) else schema:
            yield from _parts(part)
