"""What configurations have in common, and in what they differ."""

from collections.abc import Mapping
from typing import Any

from ..registry import ConfigError
from ..registry.yaml import parse, write


def compared(configs: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Fields that have one value in all configurations, and those that do not, each by its path.

    Raises:
        ConfigError: one is not a mapping in YAML.
    """
    flat: dict[str, dict[str, Any]] = {}
    for name, text in configs.items():
        fields = None if (node := parse(text, name)) is None else node.plain()
        if fields is not None and not isinstance(fields, dict):
            raise ConfigError(f"the configuration of {name} is not a mapping")
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
    """What stands in mappings, however deep, by dotted path."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = leaves(value) if isinstance(value, Mapping) else {"": value}
        found |= {f"{key}.{path}".removesuffix("."): leaf for path, leaf in inner.items()}
    return found


def shown(value: Any) -> str:
    """A value as YAML has it, in a line."""
    return value if isinstance(value, str) else write(value, in_one_line=True).removesuffix("...\n").strip()
