"""Merge a YAML document into the configuration that it changes, with current field names and default kinds."""

import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, get_args, get_origin

from .config import Config, deprecation
from .errors import ConfigError
from .registry import Registry
from .tree import Node

_warned: dict[str, dict[Any, Any]] = {}
"""Record of the warnings already shown, by the file that they are about, for `warnings.warn_explicit`, so that each is
shown once."""


def merged(base: Node | None, document: Node, cls: type[Config]) -> Node:
    """Merge a YAML document into the base configuration that it changes; return the result. `cls` is the class of both.

    A deprecated field name sets the current field, and a warning names its line. A mapping without a `kind` gets the
    default kind, unless the base has a kind there.
    """
    document = _rename_fields(document, cls, base, "")
    return document if base is None else base.merge(document)


def _rename_fields(node: Node, cls: type[Config], base: Node | None, path: str) -> Node:
    """Return a mapping of the fields of `cls` in which deprecated names are replaced by the current ones.

    `base` is the value that the mapping changes; `path` has the keys that lead to the mapping, for warnings.
    """
    entries: dict[str, Node] = {}
    originals = node.entries or {}
    for key, entry in originals.items():
        name = cls.deprecated_names.get(key, key)
        if name != key and name in originals:
            name = key  # both names are set: validation reports that
        elif name != key:
            source = entry.origin.source
            line = entry.origin.line or 1
            sentence = deprecation(path + key, path + name)
            record = _warned.setdefault(source, {})
            warnings.warn_explicit(sentence, FutureWarning, source, line, registry=record)
        field = cls.model_fields.get(name)
        annotation = None if field is None else field.rebuild_annotation()
        entries[name] = _rename_in_value(entry, annotation, base and base.child(name), f"{path}{name}.")
    return Node(entries, node.origin)


def _rename_in_value(node: Node, annotation: Any, base: Node | None, path: str) -> Node:
    """Return a field's value with current names in all its mappings; the field's annotation gives their classes."""
    if node.entries is None:
        return node
    classes = []
    for part in _parts(annotation):
        if isinstance(part, Registry):
            return _with_kind(node, part, base, path)
        if get_origin(part) is dict:
            entries = {
                key: _rename_in_value(entry, get_args(part)[1], base and base.child(key), f"{path}{key}.")
                for key, entry in node.entries.items()
            }
            return Node(entries, node.origin)
        if isinstance(part, type) and issubclass(part, Config):
            classes.append(part)
    return _rename_fields(node, classes[0], base, path) if len(classes) == 1 else node


def _with_kind(node: Node, registry: Registry[Any], base: Node | None, path: str) -> Node:
    """Return a mapping whose kind is one of a registry's, with current names.

    If neither it nor the base has a `kind`, the registry's default kind is added.
    """
    kind = node.child("kind") or (base and base.child("kind"))
    if kind is None and registry.default_kind is not None:
        kind = Node(registry.default_kind, node.origin)
        node = Node({"kind": kind, **(node.entries or {})}, node.origin)
    cls: type[Config] = Config
    with suppress(ConfigError):  # validation reports an unknown kind
        if kind and isinstance(kind.value, str):
            cls = registry.resolve(kind.value)
    return _rename_fields(node, cls, base, path)


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and all annotations nested in it."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)
