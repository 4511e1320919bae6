"""A family of configurations in a package of its own, and distributions that plug into it."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from seqmix.registry import Config, Registry

BASE = """
from abc import ABC, abstractmethod
from seqmix.registry import Config


class ShapeConfig(Config, ABC):
    kind: str
    color: str = "red"

    @abstractmethod
    def area(self) -> float: ...
"""

SHAPE = """
from typing import Literal
from {package}.base import ShapeConfig


class {kind}Config(ShapeConfig):
    kind: Literal["{kind}"] = "{kind}"
    size: float
    '''How large it is.'''

    def area(self) -> float:
        return self.size**2
"""

_numbers = count()


@dataclass(frozen=True)
class Family:
    """A registry whose package has the built-in kinds `circle` and `square`, a base and a helper."""

    folder: Path
    package: str
    group: str
    registry: Registry[Config]

    @property
    def base(self) -> Any:
        return self.registry.base

    def shape(self, kind: str) -> str:
        """The text of a module with the configuration of a kind."""
        return SHAPE.format(package=self.package, kind=kind)

    def module(self, name: str, text: str) -> str:
        """Write a module that can be imported, and return its name."""
        module = f"{self.package}_{name}"
        (self.folder / f"{module}.py").write_text(text)
        importlib.invalidate_caches()
        return module

    def plug_in(self, kind: str, value: str) -> None:
        """Install a distribution with one entry point."""
        info = self.folder / f"dist{next(_numbers)}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {info.name.split('-')[0]}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{self.group}]\n{kind} = {value}\n")
        importlib.invalidate_caches()


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    package = f"shapes{next(_numbers)}"
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "base.py").write_text(BASE)
    (folder / "helper.py").write_text("raise RuntimeError('nobody asked for this file')")
    for kind in ("circle", "square"):
        (folder / f"{kind}.py").write_text(SHAPE.format(package=package, kind=kind))
    monkeypatch.syspath_prepend(tmp_path)
    base = importlib.import_module(f"{package}.base").ShapeConfig
    group = f"{package}.kinds"
    yield Family(tmp_path, package, group, Registry("shape", base, package=package, entry_points=group))
    for name in [name for name in sys.modules if name.startswith(package)]:
        del sys.modules[name]
