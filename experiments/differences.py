"""What configurations have in common, and in what they differ."""

import math
from collections.abc import Mapping
from typing import Any

import yaml


def compared(configs: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Fields that have one value in all configurations, and those that do not, each by its path."""
    flat = {name: dict(_fields(yaml.safe_load(text))) for name, text in configs.items()}
    paths = list(dict.fromkeys(path for fields in flat.values() for path in fields))
    by_path = {path: {name: fields[path] for name, fields in flat.items() if path in fields} for path in paths}
    same = {
        path: next(iter(values.values()))
        for path, values in by_path.items()
        if len(values) == len(flat) and len(set(map(repr, values.values()))) == 1
    }
    return same, {path: values for path, values in by_path.items() if path not in same}


def _fields(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in _fields(inner, f"{path}.{key}" if path else str(key))]
    return [(path, value)] if path else []


def shown(value: Any) -> str:
    """A value as YAML has it, in a line."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()
