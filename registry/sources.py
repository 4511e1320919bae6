"""Read a preset or a YAML file, merged with the files that it extends, into one tree."""

import os
from pathlib import Path
from typing import Any

from .config import Config
from .errors import ConfigError, choices_hint, nearest_hint, shown
from .files import read_bytes
from .merge import merged
from .tree import Node, Origin
from .yaml import parse

EXTENDS = "extends"
"""The key that names the preset or file that a file changes."""


def read(source: str | Path, presets: Path, cls: type[Config] = Config, *, folder: Path | None = None) -> Node:
    """Read a preset or a YAML file as a tree, merged into the files that it extends.

    Args:
        source: a file, or a word. A word means a file if it ends in .yaml or .yml, contains a separator, or is the name
            of an existing file; otherwise it means a preset.
        presets: the folder of the presets.
        cls: the configuration's class, which defines deprecated names and default kinds.
        folder: the folder that relative file names start from, if a file names the source; the source may then not be a
            pipe or a device. None if a command names it.

    Raises:
        ConfigError: a source is unknown, unreadable or not a YAML mapping, or files extend each other in a circle.
    """
    path = source if isinstance(source, Path) else _locate(source, folder or Path(), presets, "")
    return _read(path, presets, (), "", cls, named_by_file=folder is not None)


def read_mapping(source: str | Path, presets: Path) -> dict[str, Any]:
    """Read a preset or file as plain data, merged into the files that it extends; raises the errors of `read`."""
    return read(source, presets).plain()


def _read(
    path: Path, presets: Path, chain: tuple[Path, ...], named_at: str, cls: type[Config], *, named_by_file: bool = True
) -> Node:
    """Read the tree of a file; `chain` has the files that extend it; errors about its name begin with `named_at`."""
    if os.path.realpath(path) in [os.path.realpath(file) for file in chain]:
        circle = " -> ".join(_name(file) for file in (*chain, path))
        raise ConfigError(f"{named_at}files extend each other in a circle: {circle}; remove one `extends`")
    document = _document(path, named_at, named_by_file)
    extends = document.child(EXTENDS)
    difference = Node({key: node for key, node in (document.entries or {}).items() if key != EXTENDS}, document.origin)
    if extends is None:
        for key, node in (difference.entries or {}).items():
            if key not in cls.model_fields and (hint := nearest_hint(key, [EXTENDS])):
                raise ConfigError(f"{node.origin}: unknown key {key!r}{hint}")
        return merged(None, difference, cls)
    here = f"{extends.origin}: {EXTENDS}: "
    if not isinstance(extends.value, str):
        raise ConfigError(f"{here}expected the name of a preset or a file, got {shown(extends.plain())}")
    base = _locate(extends.value, path.parent, presets, here)
    return merged(_read(base, presets, (*chain, path), here, cls), difference, cls)


def _locate(name: str, folder: Path, presets: Path, named_at: str) -> Path:
    """Return the path of the file or preset that `name` means; a file is relative to `folder`."""
    path = folder / name
    preset = presets / f"{name}.yaml"
    if path.suffix in (".yaml", ".yml") or "/" in name or os.sep in name or _is_file(path):
        return path
    if _is_file(preset):
        return preset
    names = sorted(file.stem for file in presets.glob("*.yaml"))
    raise ConfigError(f"{named_at}unknown preset {name!r}{choices_hint(name, names, 'presets')}")


def _document(path: Path, named_at: str, named_by_file: bool) -> Node:
    """Read the mapping in a file; `named_by_file` is True if another file names it, False if a command does."""
    name = _name(path)
    try:
        # a command may name a pipe, as <(...) does, but a file may not
        text = (read_bytes(path) if named_by_file else path.read_bytes()).decode("utf-8")
    except FileNotFoundError:
        siblings = [file.name for file in path.parent.glob(f"*{path.suffix}")]
        raise ConfigError(f"{named_at}no file {name}{nearest_hint(path.name, siblings)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{named_at}{name} is a folder, not a YAML file") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{name}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8 text: save the file as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(f"{named_at}{name} cannot be read: {error.strerror}") from error
    document = parse(text, name) or Node({}, Origin(name, 1))
    if document.entries is None:
        # its contents are not quoted: a stranger's file may extend any file, or link to it
        kind = {str: "text", tuple: "a list"}.get(type(document.value), "a single value")
        raise ConfigError(f"{document.origin}: expected a mapping of keys to values, got {kind}")
    return document


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # Path.is_file raises an error if the name is too long for a file


def _name(path: Path) -> str:
    """Return a path as errors print it: relative to the working directory if inside it, short and clickable."""
    return str(path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path)
