"""Parse YAML into a tree of values with their lines, and write values as YAML.

The dialect is YAML 1.2, by ruamel.yaml: only `true` and `false` are booleans, `010` is ten, and `1e-3` is a number.
Keys and dates are strings.
"""

import math
from dataclasses import replace
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter

from .errors import ConfigError
from .tree import COMMAND_LINE, Node, Origin

MAX_VALUES = 100_000
"""Maximum number of values in a document after aliases are expanded: a few nested aliases may stand for billions."""

MAX_CHARACTERS = 300_000
"""Maximum number of characters in a document: longer ones take seconds to parse."""

_TAG = "tag:yaml.org,2002:"
_CONVERTED = ("null", "bool", "int", "float")
_STRINGS = ("str", "timestamp", "value", "merge")
"""YAML tags of scalars that are read as strings; dates, and `=` and `<<` in the place of a value, are strings too."""


def parse(text: str, source: str) -> Node | None:
    """Read one YAML document; return None if it is empty.

    `source` is its name in errors. Errors also give the line, unless `source` is `COMMAND_LINE`.

    Raises:
        ConfigError: the text is not YAML, gives a key twice, or uses a feature that is not supported, such as tags.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{source}: expected at most {MAX_CHARACTERS:,} characters, got {len(text):,}")
    loader = YAML(typ="safe", pure=True)
    try:
        root = loader.compose(text)
        return None if root is None else _Builder(loader.constructor, source).build(root)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        sentence = ", ".join(filter(None, (error.context, error.problem)))
        if "'\\t'" in sentence:
            sentence = "YAML does not allow a tab here: use spaces"
        place = f"{_origin(source, mark)}: column {mark.column + 1}" if mark else source
        raise ConfigError(f"{place}: {sentence}") from error
    except ReaderError as error:
        character = f"character {error.position + 1} (#x{error.character:04x})"
        raise ConfigError(f"{source}: {character} is not allowed in YAML") from error
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None


def write(value: Any, *, in_one_line: bool = False) -> str:
    """Return dicts, lists and scalars as YAML, keys in their order; `parse` reads the same values back."""
    dumper = YAML(typ="safe", pure=True)
    dumper.Representer = _Representer
    dumper.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    dumper.brace_single_entry_mapping_in_flow_sequence = True
    dumper.default_flow_style = in_one_line
    # ruamel would fold a quoted string at an escape, and read a space more
    dumper.width = math.inf  # pyright: ignore[reportAttributeAccessIssue]
    stream = StringIO()
    dumper.dump(value, stream)
    return stream.getvalue()


class _Builder:
    """Converter of ruamel's nodes to `Node`s."""

    def __init__(self, constructor: Any, source: str) -> None:
        self._constructor = constructor
        self._source = source
        self._count = 0
        """Number of values built so far; each use of an alias counts its values again."""
        self._built: dict[Any, tuple[Node, int] | None] = {}
        """Tree and number of values of each of ruamel's nodes; None while its tree is being built."""

    def build(self, node: Any) -> Node:
        """Return the tree of a node. An anchored node is built only once."""
        before = self._count
        if node not in self._built:
            self._built[node] = None
            self._count += 1
            tree = Node(self._value(node), _origin(self._source, node.start_mark))
            self._built[node] = tree, self._count - before
        elif (built := self._built[node]) is not None:
            tree, size = built
            self._count += size
        else:
            raise self._error(node, "this alias refers to a value that contains it: remove the alias")
        if self._count > MAX_VALUES:
            raise self._error(node, f"expected at most {MAX_VALUES:,} values after expanding aliases, got more")
        return tree

    def _value(self, node: Any) -> Any:
        tag = node.tag.removeprefix(_TAG)
        if isinstance(node, MappingNode) and tag == "map":
            return self._mapping(node)
        if isinstance(node, SequenceNode) and tag == "seq":
            return tuple(self.build(item) for item in node.value)
        if isinstance(node, ScalarNode) and tag in _STRINGS:
            return node.value
        if not isinstance(node, ScalarNode) or tag not in _CONVERTED:
            tag = node.tag.replace(_TAG, "!!")
            raise self._error(node, f"the tag {tag} is not allowed: remove it")
        try:
            return self._constructor.construct_object(node)
        except (ValueError, LookupError) as error:
            digits = len(node.value)  # Python refuses to convert numbers of thousands of digits
            sentence = (
                f"a number of {digits} digits is too long" if digits > 1000 else f"{node.value!r} is not a valid {tag}"
            )
            raise self._error(node, sentence) from error

    def _mapping(self, node: Any) -> dict[str, Node]:
        first: dict[str, Any] = {}
        for key, _ in node.value:
            if (word := self._key(key)) in first:
                line = _origin(self._source, first[word].start_mark).line
                raise self._error(
                    key, f"key {word!r} is given twice" + (f", first in line {line}" if line else "") + ": remove one"
                )
            first[word] = key
        self._constructor.flatten_mapping(node)  # puts the entries that `<<` merges before the node's own
        return {
            self._key(key): replace(self.build(value), origin=_origin(self._source, key.start_mark))
            for key, value in node.value
        }

    def _key(self, node: Any) -> str:
        if isinstance(node, ScalarNode):
            return node.value
        raise self._error(node, "expected a word as a key, got a list or a mapping")

    def _error(self, node: Any, sentence: str) -> ConfigError:
        return ConfigError(f"{_origin(self._source, node.start_mark)}: {sentence}")


def _origin(source: str, mark: Any) -> Origin:
    return Origin(source, None if source == COMMAND_LINE else mark.line + 1)


class _Representer(SafeRepresenter):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 write shared values in full, without aliases
        return True


def _represent_list(representer: _Representer, items: list[Any]) -> SequenceNode:
    in_one_line = not any(isinstance(item, list | dict) for item in items)
    return representer.represent_sequence(f"{_TAG}seq", items, flow_style=in_one_line or None)


def _represent_float(representer: _Representer, value: float) -> ScalarNode:
    node = representer.represent_float(value)
    if "." not in node.value:
        node.value = node.value.replace("e", ".0e")  # readers of YAML 1.1 take 1e-06 for a string
    return node


def _represent_string(representer: _Representer, text: str) -> ScalarNode:
    # only the style with escapes keeps some line breaks (U+0085, U+2028), which others read as spaces; and without
    # quotes, text that begins with a question mark is read as a key
    plain = text.isprintable() and not text.startswith("?")
    return representer.represent_scalar(f"{_TAG}str", text, style=None if plain else '"')


_Representer.add_representer(list, _represent_list)
_Representer.add_representer(float, _represent_float)
_Representer.add_representer(str, _represent_string)
