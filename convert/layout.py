"""Tensors of another library laid out as those of a model here, and back, bit for bit.

Each tensor here is stated once, as parts of theirs one after another. The way back needs no statement: what the parts
do to the positions of numbers says where each number came from.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

import torch
from einops import repeat
from torch import Tensor

from ..registry import SeqmixError, nearest


@dataclass(frozen=True)
class Part:
    """A tensor of theirs, or what a pattern makes of it."""

    name: str
    shape: tuple[int, ...]
    pattern: str = ""
    """As `einops.repeat` has it; empty for the tensor as it is."""
    index: int | tuple[int, ...] | None = None
    """Which entry of the first dimension of the result, or which and in which order; None for all."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of the pattern's dimensions."""

    def __call__(self, x: Tensor) -> Tensor:
        """The part of their tensor."""
        made = repeat(x, self.pattern, **self.sizes) if self.pattern else x
        return made if self.index is None else made[list(self.index) if isinstance(self.index, tuple) else self.index]

    @property
    def action(self) -> str:
        """What is done, in words."""
        sizes = ", ".join(f"{name} = {size}" for name, size in self.sizes.items() if name in self.pattern)
        if isinstance(self.index, tuple):
            return f"rows {_rows(self.index)}"
        entry = "" if self.index is None else f", entry {self.index}"
        return f"{self.pattern}{f' ({sizes})' if sizes else ''}{entry}" if self.pattern else "as it is"


def part(name: str, *shape: int, pattern: str = "", index: int | tuple[int, ...] | None = None, **sizes: int) -> Part:
    """A part of their tensor of this name and shape."""
    return Part(name, shape, pattern, index, sizes)


@dataclass(frozen=True)
class Rule:
    """A tensor here: parts of theirs, concatenated along `dim`; zeros where there are none."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    dim: int = 0

    def __call__(self, theirs: Mapping[str, Tensor]) -> Tensor:
        """The tensor here, of theirs by name."""
        made = [part(theirs[part.name]) for part in self.parts]
        if not made:
            return torch.zeros(self.shape)
        return made[0] if len(made) == 1 else torch.cat(made, self.dim)

    @property
    def sources(self) -> dict[str, tuple[int, ...]]:
        """Shapes of their tensors that take part, by name."""
        return {part.name: part.shape for part in self.parts}


def to_ours(
    rules: Iterable[Rule], theirs: Mapping[str, Tensor], where: object, unread: str, copies: Mapping[str, str]
) -> dict[str, Tensor]:
    """All tensors of a model here, of theirs by name.

    Names that match `unread` carry nothing: buffers that their code computes. `copies` are names of theirs that may be
    there once more, and the tensors that they repeat.

    Raises:
        SeqmixError: a tensor is missing, has another shape than the configuration says, or is left over.
    """
    rules = list(rules)
    sources = {name: shape for rule in rules for name, shape in rule.sources.items()}
    for name, shape in sources.items():
        if name not in theirs:
            raise SeqmixError(f"{where} lacks the tensor {name}, of shape {list(shape)}{nearest(name, theirs)}")
        if theirs[name].shape != shape:
            raise SeqmixError(
                f"{where}: the tensor {name} has shape {list(theirs[name].shape)}, by config.json {list(shape)}"
            )
    for name in sorted(theirs.keys() - sources.keys()):
        if name in copies and torch.equal(theirs[name], theirs[copies[name]]):
            continue
        if not re.fullmatch(unread, name):
            raise SeqmixError(
                f"{where} has a tensor {name} of shape {list(theirs[name].shape)}, which nothing here takes"
            )
    return {rule.name: rule(theirs).contiguous() for rule in rules}


def to_theirs(rules: Iterable[Rule], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of their model.

    Raises:
        SeqmixError: a tensor here differs where theirs has one number for several places.
    """
    theirs: dict[str, Tensor] = {}
    rules = list(rules)
    missing: dict[str, Tensor] = {}
    for rule in rules:
        x = ours[rule.name]
        sizes = {name: math.prod(shape) for name, shape in rule.sources.items()}
        if not rule.parts:
            continue
        if len(rule.parts) == 1 and rule.parts[0].action == "as it is":
            theirs[rule.parts[0].name] = x
            continue
        # where each number of x lies in theirs, one after another
        positions = torch.arange(sum(sizes.values())).split(list(sizes.values()))
        places = {name: at.view(rule.sources[name]) for name, at in zip(sizes, positions, strict=True)}
        taken = rule(places).flatten()
        numbers = x.new_zeros(sum(sizes.values()))
        known = torch.zeros(sum(sizes.values()), dtype=torch.bool)
        numbers[taken], known[taken] = x.flatten(), True
        for name, at in places.items():
            theirs.setdefault(name, x.new_zeros(at.shape))[known[at]] = numbers[at][known[at]]
            missing[name] = missing.get(name, torch.ones(at.shape, dtype=torch.bool)) & ~known[at]
    for rule in rules:
        if not torch.equal(rule(theirs), ours[rule.name]):
            raise SeqmixError(
                f"{rule.name} differs between heads that have one and the same part of {', '.join(rule.sources)}"
                if rule.parts
                else f"{rule.name} is not zero, and theirs has no such tensor"
            )
    assert not any(places.any() for places in missing.values()), "a declaration leaves a part of a tensor out"
    return {name: x.contiguous() for name, x in theirs.items()}


def plan(rules: Iterable[Rule]) -> list[tuple[str, str, str, str]]:
    """Rows of a table: a tensor here, its shape, a tensor of theirs with its shape, what is done; layers and experts
    once."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for rule in rules:
        at = re.search(r"\.(\d+)\.", rule.name)
        done = 0
        for (source, shape, action), same in groupby(rule.parts, key=lambda each: _described(each, bool(at))):
            first = done + 1
            done = done + len(list(same))
            several = f"{first} to {done}" if done > first else f"{first}"
            joined = f"part {several} of {len(rule.parts)}: " if len(rule.parts) > 1 else ""
            name = re.sub(r"\.\d+\.", ".N.", rule.name, count=1)
            row = (name, _shape(rule.shape), f"{source} {_shape(shape)}", joined + action)
            rows.setdefault(row, []).extend([at[1]] if at else [])
    return [(_at(name, layers), *row[1:]) for row, layers in rows.items() for name in row[:1]]


def _described(each: Part, layered: bool) -> tuple[str, tuple[int, ...], str]:
    """The name of a part without the numbers of its layer and expert, its shape, and what is done."""
    name = re.sub(r"\.\d+\.", ".N.", each.name, count=1) if layered else each.name
    return re.sub(r"(\.experts)\.\d+\.", r"\1.E.", name), each.shape, each.action


def _rows(index: tuple[int, ...]) -> str:
    """The first ranges of rows."""
    starts = [i for i, row in enumerate(index) if i == 0 or row != index[i - 1] + 1]
    ends = [*(i - 1 for i in starts[1:]), len(index) - 1]
    ranges = [f"{index[i]}-{index[j]}" if j > i else f"{index[i]}" for i, j in zip(starts, ends, strict=True)]
    return ", ".join(ranges[:4]) + (", ..." if len(ranges) > 4 else "")


def _at(name: str, layers: list[str]) -> str:
    """A name with the layers that it stands for."""
    several = ",".join(layers) if len(layers) < 4 else f"{layers[0]},{layers[1]},...,{layers[-1]}"
    return name.replace(".N.", f".{{{several}}}." if len(layers) > 1 else f".{several}.", 1)


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{' '.join(map(str, shape))}]"
