"""Where kinds come from: the files of a package, entry points, dotted paths. Listing them imports nothing."""

import importlib
import importlib.metadata
import importlib.util
import inspect
import operator
import os
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from .errors import ConfigError, nearest

Provider = type | str
"""What provides a kind: a class, a dotted path to one, `my_package.my_module:MyConfig`, or a module."""


def files(package: str) -> Iterator[tuple[str, Provider]]:
    """The modules of a package whose text has `kind: Literal["<the module's own name>"]`, by that name."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations if spec else None) or []:
        yield from _modules(package, folder, _stamp(folder))


def entry_points(group: str | None) -> Iterator[tuple[str, Provider]]:
    """What installed distributions offer in a group, by name; several may use the same name."""
    yield from _points(group, tuple((folder, _stamp(folder)) for folder in sys.path)) if group else ()


# planning a study resolves kinds tens of thousands of times: folders are read again where something was added to them


@lru_cache(maxsize=128)
def _modules(package: str, folder: str, stamp: int) -> tuple[tuple[str, Provider], ...]:  # noqa: ARG001
    files = (file for file in Path(folder).glob("*.py") if _names_itself(file))
    return tuple((file.stem, f"{package}.{file.stem}") for file in files)


def _names_itself(file: Path) -> bool:
    return f'kind: Literal["{file.stem}"]' in file.read_text(encoding="utf-8")


@lru_cache(maxsize=128)
def _points(group: str, folders: tuple[tuple[str, int], ...]) -> tuple[tuple[str, Provider], ...]:  # noqa: ARG001
    return tuple((point.name, point.value) for point in importlib.metadata.entry_points(group=group))


def _stamp(folder: str) -> int:
    """When something was last added to a folder, or removed; 0 of none."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


def module_of(provider: Provider) -> str:
    """The full name of a provider's module."""
    return provider.partition(":")[0] if isinstance(provider, str) else provider.__module__


def load(provider: Provider, base: type[BaseModel]) -> Any:
    """Import what a provider names, without checking it; exceptions of the import propagate.

    Raises:
        ConfigError: the path is malformed, or the module has no such class.
    """
    if not isinstance(provider, str):
        return provider
    module, colon, name = provider.partition(":")
    if colon and not (module and name):
        raise ConfigError(f"{provider!r} is not a path like my_package.my_module:MyConfig")
    imported = import_named(module)
    if colon:
        try:
            return operator.attrgetter(name)(imported)
        except AttributeError:
            raise ConfigError(f"module {module} has no {name}{nearest(name, vars(imported))}") from None
    kind = module.rpartition(".")[2]
    for value in vars(imported).values():
        if isinstance(value, type) and issubclass(value, base) and kind_of(value) == kind:
            return value
    raise ConfigError(f'{module} has no subclass of {path_of(base)} with kind: Literal["{kind}"]')


def import_named(module: str) -> ModuleType:
    """Import the module of a dotted path; the working directory is searched last, so that it stands in for no library.

    Raises:
        Exception: whatever the import raises; an ImportError for what would end the program, such as `sys.exit`.
        KeyboardInterrupt: the user's Ctrl-C.
    """
    top = module.partition(".")[0]
    if top and "" not in sys.path and top not in sys.modules and importlib.util.find_spec(top) is None:
        sys.path.append("")
    try:
        return importlib.import_module(module)
    except (Exception, KeyboardInterrupt):
        raise
    except SystemExit as ended:
        raise ImportError(f"{module} calls sys.exit({ended.code!r}) when it is imported") from ended
    except BaseException as error:  # of a library that has its own, as pytest's skip or a panic in Rust
        raise ImportError(reason_of(error)) from error


def unimported(value: Any) -> list[str]:
    """The dotted paths in plain data, such as a configuration, whose modules are not imported yet.

    Whoever reads a file of someone else asks this before validating it, which imports them.
    """
    found = set[str]()
    parts = [value]
    while parts:  # not by recursion: a file may be nested deeper than Python's stack
        part = parts.pop()
        if isinstance(part, str) and ":" in part and part.partition(":")[0] not in sys.modules:
            found.add(part)
        parts.extend(part.values() if isinstance(part, Mapping) else part if isinstance(part, list | tuple) else ())
    return sorted(found)


def require_trusted(value: Any, name: object, how: str) -> None:
    """Refuse plain data that names code that is not imported yet.

    Args:
        value: a configuration that someone else may have written.
        name: what errors call its file.
        how: what to do if it is trusted: "give --trust".

    Raises:
        ConfigError: it does; the paths.
    """
    if named := unimported(value):
        raise ConfigError(
            f"{name} names code that loading it would import: {', '.join(named)}; if you trust where it is from, {how}"
        )


def import_object(path: str, what: str) -> Any:
    """What a dotted path names, such as `my_package.my_module:MyLogger`; errors call it `what`.

    Raises:
        ConfigError: its module cannot be loaded, or has no such name.
    """
    try:
        return load(path, BaseModel)
    except Exception as error:  # an import may raise anything
        raise ConfigError(f"{what} {path!r} cannot be loaded: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """Why a module cannot be loaded, in a line."""
    try:
        text = str(error)
    except Exception:  # an error of someone else's class
        text = "its message cannot be shown"
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}".split("\n")[0]


def path_of(config: type) -> str:
    """The path that names a class: `my_package.my_module:MyConfig`."""
    return f"{config.__module__}:{config.__qualname__}"


def kind_of(config: type[BaseModel]) -> str | None:
    """The word in the `kind: Literal["word"]` of a class; None where it declares none."""
    field = config.model_fields.get("kind")
    words = get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
    return words[0] if len(words) == 1 and isinstance(words[0], str) else None


def require_kind(candidate: object, base: type[BaseModel]) -> str:
    """The kind of a configuration of a family.

    Raises:
        ConfigError: the candidate is not a subclass of the base, is abstract, or declares no kind.
    """
    if not (isinstance(candidate, type) and issubclass(candidate, base)):
        name = path_of(candidate) if isinstance(candidate, type) else repr(candidate)
        raise ConfigError(f"{name} is not a subclass of {path_of(base)}")
    if inspect.isabstract(candidate):
        lacks = ", ".join(sorted(candidate.__abstractmethods__))
        raise ConfigError(f"{path_of(candidate)} is abstract: it lacks {lacks}")
    if (kind := kind_of(candidate)) is None:
        raise ConfigError(f'{path_of(candidate)} must declare kind: Literal["its_name"]')
    return kind
