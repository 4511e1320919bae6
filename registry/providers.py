"""Sources of kinds: files of a package, entry points, dotted paths. Listing the kinds imports no modules."""

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

from .errors import ConfigError, nearest_hint, reason_of

Provider = type | str
"""Provider of a kind: a class, the dotted path of one (`my_package.my_module:MyConfig`), or the name of a module."""


def files(package: str) -> Iterator[tuple[str, Provider]]:
    """Yield the kinds that a package's modules define, each with the module's full name.

    A module defines a kind if its text has `kind: Literal["<module name>"]`.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations if spec else None) or []:
        yield from _modules(package, folder, _stamp(folder))


def entry_points(group: str | None) -> Iterator[tuple[str, Provider]]:
    """Yield name and dotted path of each entry point in a group of the installed packages; a name may occur twice."""
    yield from _points(group, tuple((folder, _stamp(folder)) for folder in sys.path)) if group else ()


# planning a study resolves kinds tens of thousands of times, so a folder is only read again after it has changed


@lru_cache(maxsize=128)
def _modules(package: str, folder: str, stamp: int) -> tuple[tuple[str, Provider], ...]:  # noqa: ARG001
    files = (file for file in Path(folder).glob("*.py") if _declares_kind(file))
    return tuple((file.stem, f"{package}.{file.stem}") for file in files)


def _declares_kind(file: Path) -> bool:
    return f'kind: Literal["{file.stem}"]' in file.read_text(encoding="utf-8")


@lru_cache(maxsize=128)
def _points(group: str, folders: tuple[tuple[str, int], ...]) -> tuple[tuple[str, Provider], ...]:  # noqa: ARG001
    return tuple((point.name, point.value) for point in importlib.metadata.entry_points(group=group))


def _stamp(folder: str) -> int:
    """Return the modification time of a folder, in nanoseconds; 0 if it does not exist."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


def module_of(provider: Provider) -> str:
    """Return the full name of the module that has a provider's class."""
    return provider.partition(":")[0] if isinstance(provider, str) else provider.__module__


def load(provider: Provider, base: type[BaseModel]) -> Any:
    """Import and return the class of a kind's provider, without checking it; exceptions of the import propagate.

    Raises:
        ConfigError: the path is malformed, or the module has no such class.
    """
    if not isinstance(provider, str):
        return provider
    module, colon, name = provider.partition(":")
    if colon and not (module and name):
        raise ConfigError(f"expected a path like my_package.my_module:MyConfig, got {provider!r}")
    imported = import_named(module)
    if colon:
        try:
            return operator.attrgetter(name)(imported)
        except AttributeError:
            raise ConfigError(f"module {module} has no {name}{nearest_hint(name, vars(imported))}") from None
    kind = module.rpartition(".")[2]
    for value in vars(imported).values():
        if isinstance(value, type) and issubclass(value, base) and kind_of(value) == kind:
            return value
    raise ConfigError(f'{module} has no subclass of {path_of(base)} with kind: Literal["{kind}"]')


def import_named(module: str) -> ModuleType:
    """Import a module by its full name; the working directory is searched last, so that it cannot shadow a library.

    Raises:
        Exception: any exception of the import; ImportError if the module would end the program, as `sys.exit` does.
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
    except BaseException as error:  # raised by a library, such as pytest's skip or a panic in Rust
        raise ImportError(reason_of(error)) from error


def unimported(value: Any) -> list[str]:
    """Return the dotted paths in plain data, such as a configuration, whose modules are not imported yet.

    Validation imports these modules: call this first if another person may have written the data.
    """
    return [path for path in named_paths(value) if path.partition(":")[0] not in sys.modules]


def named_paths(value: Any) -> list[str]:
    """Return the dotted paths in plain data."""
    paths = set[str]()
    parts = [value]
    while parts:  # not by recursion: a file may be nested deeper than Python's stack
        part = parts.pop()
        if isinstance(part, str) and ":" in part:
            paths.add(part)
        if isinstance(part, Mapping):
            parts.extend(part.values())
        elif isinstance(part, list | tuple):
            parts.extend(part)
    return sorted(paths)


def require_trusted(value: Any, name: object, how: str) -> None:
    """Refuse plain data that names code, as dotted paths, whose modules are not imported yet.

    Args:
        value: a configuration that another person may have written.
        name: the name of its file in errors.
        how: the remedy for trusted data: "give --trust".

    Raises:
        ConfigError: the data names such code; the message lists the paths.
    """
    if paths := unimported(value):
        raise ConfigError(
            f"loading {name} would import code that it names: {', '.join(paths)}; if you trust its source, {how}"
        )


def import_object(path: str, what: str) -> Any:
    """Import the object at a dotted path, such as `my_package.my_module:MyLogger`.

    `what` is the noun for the object in errors: "logger".

    Raises:
        ConfigError: the module cannot be loaded, or has no such name.
    """
    try:
        return load(path, BaseModel)
    except Exception as error:  # an import may raise anything
        raise ConfigError(f"{what} {path!r} cannot be loaded: {reason_of(error)}") from error


def path_of(config: type) -> str:
    """Return the dotted path of a class: `my_package.my_module:MyConfig`."""
    return f"{config.__module__}:{config.__qualname__}"


def kind_of(config: type[BaseModel]) -> str | None:
    """Return the word in the `kind: Literal["word"]` of a class; None if it does not declare a kind."""
    field = config.model_fields.get("kind")
    words = get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
    return words[0] if len(words) == 1 and isinstance(words[0], str) else None


def _extending(base: type[BaseModel], module: str) -> list[str]:
    """Return the paths of a module's own classes that extend `base`."""
    values = vars(sys.modules[module]).values() if module in sys.modules else ()
    return [path_of(v) for v in values if isinstance(v, type) and issubclass(v, base) and v.__module__ == module]


def require_kind(candidate: object, base: type[BaseModel]) -> str:
    """Check that a class is a configuration that extends `base`, and return its kind.

    Raises:
        ConfigError: the candidate is not a subclass of the base, is abstract, or declares no kind.
    """
    if not (isinstance(candidate, type) and issubclass(candidate, base)):
        name = path_of(candidate) if isinstance(candidate, type) else repr(candidate)
        found = [] if not isinstance(candidate, type) else _extending(base, candidate.__module__)
        hint = f"; did you mean {' or '.join(found)}?" if found else ""
        raise ConfigError(f"expected a subclass of {path_of(base)}, got {name}{hint}")
    if inspect.isabstract(candidate):
        missing = ", ".join(sorted(candidate.__abstractmethods__))
        raise ConfigError(f"{path_of(candidate)} is abstract: define {missing}")
    if (kind := kind_of(candidate)) is None:
        raise ConfigError(f'{path_of(candidate)} must declare kind: Literal["its_name"]')
    return kind
