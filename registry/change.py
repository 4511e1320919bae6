"""Apply a document to a configuration: deprecated field names become the current ones, default kinds are filled in."""

import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, get_args, get_origin

from .config import Config, deprecation
from .errors import ConfigError
from .registry import Registry
from .tree import Node

_warned: dict[str, dict[Any, Any]] = {}
"""The record that `warnings` needs for each source to show a warning once."""


def change(base: Node | None, document: Node, cls: type[Config]) -> Node:
    """Merge a document into the tree that it changes, both for the same configuration class.

    A deprecated field name sets the current field, and a warning names its line. A mapping without a `kind` gets the
    default kind, unless the base has a kind there.
    """
    document = _renamed(document, cls, base, "")
    return document if base is None else base.merge(document)


def _renamed(node: Node, cls: type[Config], base: Node | None, path: str) -> Node:
    """A mapping of a class's fields under their current names; `base` is what it changes, and `path` leads to it."""
    entries: dict[str, Node] = {}
    given = node.entries or {}
    for key, entry in given.items():
        name = cls.deprecated_names.get(key, key)
        if name != key and name in given:
            name = key  # the class refuses both
        elif name != key:
            source = entry.origin.source
            line = entry.origin.line or 1
            sentence = deprecation(path + key, path + name)
            shown = _warned.setdefault(source, {})
            warnings.warn_explicit(sentence, FutureWarning, source, line, registry=shown)
        field = cls.model_fields.get(name)
        annotation = None if field is None else field.rebuild_annotation()
        entries[name] = _renamed_entry(entry, annotation, base and base.child(name), f"{path}{name}.")
    return Node(entries, node.origin)


def _renamed_entry(node: Node, annotation: Any, base: Node | None, path: str) -> Node:
    """The value of a field; the annotation has the classes in it."""
    if node.entries is None:
        return node
    classes = []
    for part in _parts(annotation):
        if isinstance(part, Registry):
            return _with_kind(node, part, base, path)
        if get_origin(part) is dict:
            entries = {
                key: _renamed_entry(entry, get_args(part)[1], base and base.child(key), f"{path}{key}.")
                for key, entry in node.entries.items()
            }
            return Node(entries, node.origin)
        if isinstance(part, type) and issubclass(part, Config):
            classes.append(part)
    return _renamed(node, classes[0], base, path) if len(classes) == 1 else node


def _with_kind(node: Node, registry: Registry[Any], base: Node | None, path: str) -> Node:
    kind = node.child("kind") or (base and base.child("kind"))
    if kind is None and registry.default_kind is not None:
        kind = Node(registry.default_kind, node.origin)
        node = Node({"kind": kind, **(node.entries or {})}, node.origin)
    cls: type[Config] = Config
    with suppress(ConfigError):  # validation reports it
        if kind and isinstance(kind.value, str):
            cls = registry.resolve(kind.value)
    return _renamed(node, cls, base, path)


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and everything nested in it."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)
