"""Loading a configuration from a preset or file with overrides, and writing it down again."""

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from .config import Config
from .errors import ConfigError
from .explain import explain
from .overrides import override
from .sources import read
from .tree import COMMAND_LINE, Node, Origin
from .yaml import write

C = TypeVar("C", bound=Config)


def load(cls: type[C], source: str | Path | None, overrides: Iterable[str] = (), *, presets: Path) -> C:
    """Read a configuration.

    A file may say `extends: <preset, or file relative to this one>`: it is then a difference. Mappings merge key by
    key; lists, scalars and null replace what was there, and so does a mapping with another `kind`.

    Args:
        cls: the class of the configuration.
        source: the name of a preset, or a YAML file; None for nothing but overrides.
        overrides: changes as `dotted.path=value` with the value in YAML, applied last and in order, as if each were a
            file of one value that extends what is before it.
        presets: the folder of the presets, one file `<name>.yaml` each.

    Raises:
        ConfigError: what is wrong, in which line of which file, and what is allowed; one line an error, at most five.
    """
    tree = Node({}, Origin(COMMAND_LINE)) if source is None else read(source, presets, cls)
    for change in overrides:
        tree = override(tree, change, cls)
    try:
        return cls.model_validate(tree.plain())
    except ValidationError as error:
        raise ConfigError(explain(error, tree)) from error


def dump(config: Config) -> str:
    """YAML text of the whole configuration, keys in the order of its fields, that `load` reads as an equal one."""
    return write(config.model_dump(mode="json"))
