"""Where kinds come from: the files of a package, entry points, dotted paths. Listing them imports nothing."""

import importlib
import importlib.metadata
import importlib.util
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from .errors import ConfigError, nearest


@dataclass(frozen=True)
class Provider:
    """A module that provides a kind."""

    module: str
    """Its full name."""
    load: Callable[[], Any]
    """Imports the module and returns what it provides, unchecked; passes on whatever the import raises."""


def files(package: str, base: type[BaseModel]) -> dict[str, Provider]:
    """The modules of a package whose text says `kind: Literal["<the module's own name>"]`, by that name."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or []
    return {
        file.stem: _file(f"{package}.{file.stem}", base)
        for folder in folders
        for file in Path(folder).glob("*.py")
        if f'kind: Literal["{file.stem}"]' in file.read_text(encoding="utf-8")
    }


def entry_points(group: str) -> dict[str, list[Provider]]:
    """What installed distributions offer in a group, by name; several may use the same name."""
    found: dict[str, list[Provider]] = {}
    for point in importlib.metadata.entry_points(group=group):
        found.setdefault(point.name, []).append(dotted(point.value))
    return found


def dotted(path: str) -> Provider:
    """What a path like `my_package.my_module:MyConfig` names."""
    return Provider(path.partition(":")[0], lambda: _attribute(path))


def path_of(config: type) -> str:
    """The path that names a class: `my_package.my_module:MyConfig`."""
    return f"{config.__module__}:{config.__qualname__}"


def kind_of(config: type[BaseModel]) -> str:
    """The one word in the `kind: Literal["word"]` of a configuration.

    Raises:
        ConfigError: the class declares none.
    """
    if word := _word(config):
        return word
    raise ConfigError(f'{path_of(config)} must declare kind: Literal["its_name"]')


def require_config(candidate: object, base: type[BaseModel]) -> None:
    """Refuse what is no configuration of a family.

    Raises:
        ConfigError: the candidate is no subclass of the base, is abstract, or declares no kind.
    """
    if not (isinstance(candidate, type) and issubclass(candidate, base)):
        name = path_of(candidate) if isinstance(candidate, type) else repr(candidate)
        raise ConfigError(f"{name} is no subclass of {path_of(base)}")
    if inspect.isabstract(candidate):
        lacks = ", ".join(sorted(candidate.__abstractmethods__))
        raise ConfigError(f"{path_of(candidate)} is abstract: it lacks {lacks}")
    kind_of(candidate)


def _file(module: str, base: type[BaseModel]) -> Provider:
    def load() -> Any:
        kind = module.rpartition(".")[2]
        for value in vars(importlib.import_module(module)).values():
            if isinstance(value, type) and issubclass(value, base) and _word(value) == kind:
                return value
        raise ConfigError(f'{module} has no subclass of {path_of(base)} with kind: Literal["{kind}"]')

    return Provider(module, load)


def _word(config: type[BaseModel]) -> str | None:
    field = config.model_fields.get("kind")
    words = get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
    return words[0] if len(words) == 1 and isinstance(words[0], str) else None


def _attribute(path: str) -> Any:
    module, _, name = path.partition(":")
    if not module or not name:
        raise ConfigError(f"{path!r} is no path like my_package.my_module:MyConfig")
    imported = importlib.import_module(module)
    try:
        return operator.attrgetter(name)(imported)
    except AttributeError:
        raise ConfigError(f"module {module} has no {name}{nearest(name, vars(imported))}") from None
