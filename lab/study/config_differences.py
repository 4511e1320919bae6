"""Common and differing fields of configurations."""

from collections.abc import Mapping
from typing import Any

from ...registry import ConfigError
from ...registry.yaml import parse, write


def compare_configs(configs: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split the fields of configurations, given as YAML by name, into equal and different ones.

    Returns:
        The values that are equal in all configurations, by the field's dotted path; and the values of all other
        fields, by dotted path and name of the configuration.

    Raises:
        ConfigError: a configuration is not a YAML mapping.
    """
    flat: dict[str, dict[str, Any]] = {}
    for name, text in configs.items():
        fields = None if (node := parse(text, name)) is None else node.plain()
        if fields is not None and not isinstance(fields, dict):
            raise ConfigError(f"expected the configuration of {name} to be a mapping, got {type(fields).__name__}")
        if fields is not None:
            flat[name] = leaves(fields)
    paths = list(dict.fromkeys(path for fields in flat.values() for path in fields))
    by_path = {path: {name: fields[path] for name, fields in flat.items() if path in fields} for path in paths}
    same = {
        path: next(iter(values.values()))
        for path, values in by_path.items()
        if len(values) == len(flat) and len(set(map(repr, values.values()))) == 1
    }
    return same, {path: values for path, values in by_path.items() if path not in same}


def leaves(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested mappings into a dictionary by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = leaves(value) if isinstance(value, Mapping) else {"": value}
        flat |= {f"{key}.{path}".removesuffix("."): leaf for path, leaf in inner.items()}
    return flat


def format_value(value: Any) -> str:
    """Format a value as one line of YAML."""
    return value if isinstance(value, str) else write(value, in_one_line=True).removesuffix("...\n").strip()
