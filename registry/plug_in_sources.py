"""Source code of plug-ins that runs and exported files carry: collected from modules, and imported from its text.

A carried file is named by its path below the folder that Python searches: `average.py`, `package/__init__.py`. From the
disk nothing in a run directory is imported, wherever Python searches.
"""

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

MAX_BYTES = 2**20
"""Largest size of the source code that is collected."""
LIBRARY = __name__.partition(".")[0]
"""This library, which is never collected, even if it lies beside a plug-in."""
Sources = Mapping[str, bytes]
"""Contents of source files, by name."""


def source_files(module: str) -> dict[str, bytes]:
    """Return the source files of a top-level module, and of the modules beside it that it imports.

    It is empty for a module without source files, and for more than `MAX_BYTES`.
    """
    if is_carried(module):
        return closure(_LOADER.sources, [module])
    file = _file_of(module)
    if file is None:
        return {}
    folder = file.parent.parent if file.name == "__init__.py" else file.parent
    found: dict[str, bytes] = {}
    _add(found, [module], lambda top: _files_in(folder, top))
    return found if sum(map(len, found.values())) <= MAX_BYTES else {}


def closure(sources: Sources, modules: Iterable[str]) -> dict[str, bytes]:
    """Return the sources of top-level modules, and of those that they import."""
    found: dict[str, bytes] = {}
    _add(found, modules, lambda top: _files_of(sources, top))
    return found


def differing(sources: Sources) -> list[str]:
    """Return the top-level modules of sources that Python would not find, or would find with another text."""
    tops = dict.fromkeys(map(top_of, sources))
    return [top for top in tops if _files_of(sources, top).items() - _found_here(top).items()]


def exists_here(module: str) -> bool:
    """Return True if a top-level module is imported, or if Python finds its source."""
    return module in sys.modules or bool(_found_here(module))


def is_carried(module: str) -> bool:
    """Return True if a top-level module was imported from carried sources."""
    return isinstance(getattr(sys.modules.get(module), "__loader__", None), _CarriedLoader)


def carry(sources: Sources, modules: Iterable[str], origin: str) -> None:
    """Let these top-level modules be imported from sources; nothing is imported yet.

    Args:
        sources: the sources.
        modules: top-level modules that are not imported yet.
        origin: the name of their folder in tracebacks.
    """
    _install()
    for name, text in sources.items():
        if top_of(name) in modules:
            _LOADER.sources[name] = text
            _LOADER.files[name] = f"{origin}/{name}"


def forbid(run: Path) -> None:
    """Refuse to import the files of a run directory, even if it is the working directory; `carry` is not affected."""
    _install()
    _LOADER.forbidden.add(run.resolve())


def sha256(text: bytes) -> str:
    """Return the SHA-256 of a source file."""
    return hashlib.sha256(text).hexdigest()


def top_of(name: str) -> str:
    """Return the top-level module of a source file."""
    return name.partition("/")[0].removesuffix(".py")


class _CarriedLoader(MetaPathFinder, SourceLoader):
    """Finder and loader of the modules that `carry` has announced; it refuses those in the folders of `forbid`."""

    def __init__(self) -> None:
        self.sources: dict[str, bytes] = {}
        self.files: dict[str, str] = {}
        """Name of each source in tracebacks."""
        self.forbidden: set[Path] = set()
        """Run directories."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:  # noqa: ARG002
        """Return the spec of an announced module, or of a forbidden one, which fails to load; None for others."""
        name = self._name(fullname)
        if name is None:
            found = PathFinder.find_spec(fullname, path)
            return ModuleSpec(fullname, self) if found is not None and self.is_forbidden(found.origin) else None
        file = self.files[name]
        places = [file.rpartition("/")[0]] if name.endswith("/__init__.py") else None
        return importlib.util.spec_from_file_location(fullname, file, loader=self, submodule_search_locations=places)

    def get_filename(self, fullname: str) -> str:
        """Return the name of a module's file in tracebacks."""
        name = self._name(fullname)
        if name is None:
            raise ImportError(f"{fullname} is a file of a run, which imports only its copies of plug-ins, with --trust")
        return self.files[name]

    def get_data(self, path: str | bytes) -> bytes:
        """Return a source by its name in tracebacks."""
        for name, file in self.files.items():
            if file == path:
                return self.sources[name]
        raise OSError(f"there is no source {path!r}")

    def is_forbidden(self, file: str | None) -> bool:
        """Return True if a file, or what it links to, is in a forbidden folder."""
        folders = (Path(file).parent.resolve(), Path(file).resolve().parent) if file else ()
        return any(folder.is_relative_to(run) for folder in folders for run in self.forbidden)

    def _name(self, fullname: str) -> str | None:
        place = fullname.replace(".", "/")
        return next((name for name in (f"{place}/__init__.py", f"{place}.py") if name in self.sources), None)


_LOADER = _CarriedLoader()


def _install() -> None:
    if _LOADER not in sys.meta_path:
        sys.meta_path.insert(0, _LOADER)


def _add(found: dict[str, bytes], modules: Iterable[str], read: Callable[[str], Mapping[str, bytes]]) -> None:
    """Add the sources that `read` returns for modules, and for those that they import, to `found`."""
    waiting = list(modules)
    seen = set[str]()
    while waiting:
        if (top := waiting.pop()) in seen or top == LIBRARY:
            continue
        seen.add(top)
        files = read(top)
        found.update(files)
        for text in files.values():
            waiting += _imports(text)


def _imports(text: bytes) -> list[str]:
    """Return the top-level modules that a source file imports."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
    return [name.partition(".")[0] for name in names]


def _files_of(sources: Sources, top: str) -> dict[str, bytes]:
    """Return the sources of one top-level module."""
    return {name: text for name, text in sources.items() if top_of(name) == top}


def _files_in(folder: Path, top: str) -> dict[str, bytes]:
    """Return the source files of a top-level module in a folder."""
    paths = [folder / f"{top}.py"]
    if (folder / top / "__init__.py").is_file():
        paths = sorted((folder / top).rglob("*.py"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def _found_here(top: str) -> dict[str, bytes]:
    """Return the source files of a top-level module as Python finds it, without those that it imports."""
    if is_carried(top):
        return _files_of(_LOADER.sources, top)
    file = _file_of(top)
    if file is None:
        return {}
    return _files_in(file.parent.parent if file.name == "__init__.py" else file.parent, top)


def _file_of(top: str) -> Path | None:
    """Return the source file of a top-level module, imported or not; None if there is none."""
    if (module := sys.modules.get(top)) is not None:
        file = getattr(module, "__file__", None)
    else:
        try:
            # as `import_named` does, the working directory is searched after all other places
            spec = PathFinder.find_spec(top) or PathFinder.find_spec(top, [""])
        except (ImportError, ValueError):
            spec = None
        file = spec.origin if spec is not None and not _LOADER.is_forbidden(spec.origin) else None
    path = Path(file).absolute() if file else None
    return path if path is not None and path.suffix == ".py" and path.is_file() else None
