"""YAML text to a tree of values that know their lines. Keys are always strings."""

import re
from dataclasses import replace
from typing import Any

import yaml

from .errors import ConfigError
from .tree import Node, Origin, Scalar
from .yaml_scalars import PLAIN, TAG, Resolvers, ScalarType, resolvers

MOST_VALUES = 100_000
"""Of a document, where an alias counts as all that it names: a few lines of aliases of aliases stand for billions."""

_SCALARS = {**PLAIN, f"{TAG}str": ScalarType(re.compile(""), str)}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: Resolvers = resolvers()


def parse(text: str, source: str, *, lines: bool = True) -> Node | None:
    """Read one YAML document.

    Args:
        text: the document.
        source: what errors call it.
        lines: whether errors name lines; a command line has none.

    Returns:
        The tree, or None where there is no document.

    Raises:
        ConfigError: the text is no YAML, gives a key twice, or holds what a configuration has no use for, such as tags.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        return None if root is None else _Builder(loader, source, lines).build(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        origin = Origin(source, mark.line + 1 if mark and lines else None)
        column = f"column {mark.column + 1}: " if mark else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{origin}: {column}{reason}") from error
    except yaml.reader.ReaderError as error:
        character = f"character {error.position + 1} (#x{error.character:04x})"
        raise ConfigError(f"{source}: {character} is not allowed in YAML") from error
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None


class _Builder:
    """Turns PyYAML's nodes into ours."""

    def __init__(self, loader: _Loader, source: str, lines: bool) -> None:
        self._loader = loader
        self._source = source
        self._lines = lines
        self._built: dict[yaml.Node, tuple[Node, int]] = {}
        """Trees, and the values in each."""
        self._open: set[yaml.Node] = set()
        self._values = 0
        """So far."""

    def build(self, node: yaml.Node) -> Node:
        """The tree of a node. What an anchor names is built once."""
        if node in self._open:
            raise ConfigError(f"{self._origin(node)}: an alias stands inside of what it names")
        before = self._values
        if node in self._built:
            tree, size = self._built[node]
            self._values += size
        else:
            self._open.add(node)
            tree = Node(self._value(node), self._origin(node))
            self._open.remove(node)
            self._values += 1
            self._built[node] = tree, self._values - before
        if self._values > MOST_VALUES:
            raise ConfigError(
                f"{self._origin(node)}: a document has at most {MOST_VALUES:,} values, aliases written out"
            )
        return tree

    def _value(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag == f"{TAG}map":
            return self._mapping(node)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{TAG}seq":
            return tuple(self.build(item) for item in node.value)
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node)
        tag = node.tag.replace(TAG, "!!")
        raise ConfigError(f"{self._origin(node)}: the tag {tag} is not allowed; a configuration needs none")

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Node]:
        self._refuse_duplicates(node)
        self._loader.flatten_mapping(node)  # puts what `<<` merges before the node's own entries
        return {self._key(key): replace(self.build(value), origin=self._origin(key)) for key, value in node.value}

    def _refuse_duplicates(self, node: yaml.MappingNode) -> None:
        first: dict[str, yaml.Node] = {}
        for key_node, _ in node.value:
            key = self._key(key_node)
            if key in first and key_node.tag != f"{TAG}merge":
                before = f", first in line {first[key].start_mark.line + 1}" if self._lines else ""
                raise ConfigError(f"{self._origin(key_node)}: key {key!r} is given twice{before}")
            first[key] = key_node

    def _key(self, node: yaml.Node) -> str:
        if isinstance(node, yaml.ScalarNode):
            return node.value
        raise ConfigError(f"{self._origin(node)}: a key must be a word, not a list or a mapping")

    def _scalar(self, node: yaml.ScalarNode) -> Scalar:
        scalar = _SCALARS[node.tag]
        if not scalar.pattern.match(node.value):
            raise ConfigError(f"{self._origin(node)}: {node.value!r} is no {node.tag.removeprefix(TAG)}")
        try:
            return scalar.convert(node.value)
        except ValueError as error:  # Python refuses to read thousands of digits
            raise ConfigError(f"{self._origin(node)}: a number of {len(node.value)} digits is too long") from error

    def _origin(self, node: yaml.Node) -> Origin:
        return Origin(self._source, node.start_mark.line + 1 if self._lines else None)
