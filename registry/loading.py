"""Load a configuration from a preset or file with overrides, and dump it as YAML."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from .config import Config
from .errors import ConfigError, shown
from .explain import explain
from .merge import merged
from .sources import read
from .tree import COMMAND_LINE, Node, Origin
from .yaml import parse, write

C = TypeVar("C", bound=Config)


def load(
    cls: type[C],
    source: str | Path | None,
    overrides: Iterable[str] = (),
    *,
    presets: Path,
    complete: Callable[[Node], Node] = lambda tree: tree,
) -> C:
    """Read and validate a configuration.

    A file with `extends: <preset, or file relative to this one>` contains only the differences from that preset or
    file. Mappings merge key by key; lists, scalars and null replace the earlier value, and so does a mapping with
    another `kind`.

    Args:
        cls: the class of the configuration.
        source: the name of a preset, or a YAML file; None to use only the overrides.
        overrides: changes as `dotted.path=value` with the value in YAML, applied last and in order. Each acts like a
            file with one value that extends the result so far.
        presets: the folder of the presets, one file `<name>.yaml` each.
        complete: adds missing values to the tree before it is validated.

    Raises:
        ConfigError: the configuration is wrong. The message has one line per error, at most five: the file and line,
            what was expected, and the value.
    """
    return validated(cls, complete(_read_tree(cls, source, overrides, presets)))


def origin_of(cls: type[C], source: str | Path | None, overrides: Iterable[str], path: str, *, presets: Path) -> Origin:
    """Return the file and line of a field, given by its dotted path, of the configuration that `load` reads."""
    return _read_tree(cls, source, overrides, presets).find(path.split("."))[1].origin


def _read_tree(cls: type[Config], source: str | Path | None, overrides: Iterable[str], presets: Path) -> Node:
    """Read a file, if there is one, and apply the overrides."""
    tree = Node({}, Origin(COMMAND_LINE)) if source is None else read(source, presets, cls)
    for assignment in overrides:
        tree = override(tree, assignment, cls)
    return tree


def validated(cls: type[C], fields: Node | Mapping[str, Any], name: str = "") -> C:
    """Validate a tree, or values that were given in Python, and return the configuration.

    Errors of values that were given in Python begin with `name`, as those of a file begin with the file's name.

    Raises:
        ConfigError: the configuration is wrong; the message is as in `load`.
    """
    try:
        tree = fields if isinstance(fields, Node) else Node.of(fields, Origin(name))
        try:
            return cls.model_validate(tree.plain() if tree is fields else fields)
        except ValidationError as error:
            raise ConfigError(explain(error, tree)) from error
    except RecursionError as error:
        raise ConfigError(f"{name or COMMAND_LINE}: the configuration is nested too deeply") from error


def dump(config: Config) -> str:
    """Return the whole configuration as YAML, keys in the order of the fields; `load` reads it back."""
    return write(config.model_dump(mode="json"))


def override(tree: Node, assignment: str, cls: type[Config] = Config) -> Node:
    """Return the tree of a configuration of class `cls` after one change, `dotted.path=value`.

    Raises:
        ConfigError: the change does not have that form, its value is not YAML, or its path leads through a value that
            is not a mapping.
    """
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{COMMAND_LINE}: expected dotted.path=value, such as model.n_layers=2, got {assignment!r}")
    try:
        value = parse(text, COMMAND_LINE) or Node(None, Origin(COMMAND_LINE))
    except ConfigError as error:
        reason = str(error).removeprefix(f"{COMMAND_LINE}: ")
        if (first := text.lstrip()[:1]) in "*&!%@`":  # YAML indicators at the start of a scalar
            reason += f"; quote text that begins with {first}, also for the shell: '{path}=\"{text}\"'"
        raise ConfigError(f"{COMMAND_LINE}: {path}: the value {text!r} is not YAML: {reason}") from error
    return merged(tree, _difference(tree, keys, 0, value), cls)


def _difference(base: Node | None, keys: Sequence[str], depth: int, value: Node) -> Node:
    """Return nested mappings with `value` at the path `keys[depth:]`; mappings keep their origin in `base`."""
    if depth == len(keys):
        return value
    if base is not None and base.entries is None:
        path = ".".join(keys)
        parent = ".".join(keys[:depth])
        value_shown = shown(base.plain())
        raise ConfigError(
            f"{COMMAND_LINE}: {path}: expected {parent} to be a mapping, got {value_shown} ({base.origin})"
        )
    inner = _difference(base and base.child(keys[depth]), keys, depth + 1, value)
    return Node({keys[depth]: inner}, base.origin if base else value.origin)
