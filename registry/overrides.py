"""Changes from the command line: `dotted.path=value`, the value in YAML."""

from collections.abc import Sequence

from .change import change
from .config import Config
from .errors import ConfigError, shown
from .tree import COMMAND_LINE, Node, Origin
from .yaml import parse


def override(tree: Node, assignment: str, cls: type[Config] = Config) -> Node:
    """Apply one change to the tree of a class's configuration, as a file would that holds nothing else and extends it.

    Raises:
        ConfigError: the change is not `dotted.path=value`, its value is no YAML, or its path leads through a value that
            is no mapping.
    """
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"{COMMAND_LINE}: {assignment!r} is no change; write dotted.path=value, such as model.n_layers=2"
        )
    try:
        value = parse(text, COMMAND_LINE) or Node(None, Origin(COMMAND_LINE))
    except ConfigError as error:
        reason = str(error).removeprefix(f"{COMMAND_LINE}: ")
        if (first := text.lstrip()[:1]) in "*&!%@`":  # each has a meaning of its own where a scalar begins
            reason += f"; a text that begins with {first} is quoted, for the shell too: '{path}=\"{text}\"'"
        raise ConfigError(f"{COMMAND_LINE}: {path}: the value {text!r} is no YAML: {reason}") from error
    return change(tree, _difference(tree, keys, 0, value), cls)


def _difference(base: Node | None, keys: Sequence[str], depth: int, value: Node) -> Node:
    """The mapping that holds `value` at `keys`. Mappings on the way keep the place where a file wrote them."""
    if depth == len(keys):
        return value
    if base is not None and base.entries is None:
        path, parent = ".".join(keys), ".".join(keys[:depth])
        raise ConfigError(
            f"{COMMAND_LINE}: {path}: {parent} is {shown(base.plain())} ({base.origin}), and not a mapping"
        )
    inner = base.entries.get(keys[depth]) if base and base.entries else None
    return Node({keys[depth]: _difference(inner, keys, depth + 1, value)}, base.origin if base else value.origin)
