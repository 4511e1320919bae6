"""What configurations have in common, and in what they differ."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..registry.tree import Node
from ..registry.yaml import parse, write


def compared(configs: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Fields that have one value in all configurations, and those that do not, each by its path."""
    flat = {name: dict(_fields(parse(text, name))) for name, text in configs.items()}
    paths = list(dict.fromkeys(path for fields in flat.values() for path in fields))
    by_path = {path: {name: fields[path] for name, fields in flat.items() if path in fields} for path in paths}
    same = {
        path: next(iter(values.values()))
        for path, values in by_path.items()
        if len(values) == len(flat) and len(set(map(repr, values.values()))) == 1
    }
    return same, {path: values for path, values in by_path.items() if path not in same}


def _fields(node: Node | None, path: str = "") -> Iterator[tuple[str, Any]]:
    if node is not None and node.entries:
        for key, inner in node.entries.items():
            yield from _fields(inner, f"{path}.{key}" if path else key)
    elif node is not None and path:
        yield path, node.plain()


def shown(value: Any) -> str:
    """A value as YAML has it, in a line."""
    return value if isinstance(value, str) else write(value, in_one_line=True).removesuffix("...\n").strip()
