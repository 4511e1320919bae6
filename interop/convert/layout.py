"""Rearrange tensors of another library into those of a seqmix model, and back, bit for bit.

A rule states each seqmix tensor as a concatenation of parts of the other library's tensors. The way back needs no
declaration: applying the rules to tensors of positions shows where each number comes from.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

import torch
from einops import repeat
from torch import Tensor

from ...registry import SeqmixError, nearest_hint


@dataclass(frozen=True)
class Part:
    """A tensor of the other library, rearranged by a pattern, or selected entries of it."""

    name: str
    """Name of the other library's tensor."""
    shape: tuple[int, ...]
    """Shape of the other library's tensor."""
    pattern: str = ""
    """Pattern of `einops.repeat`; empty leaves the tensor unchanged."""
    index: int | tuple[int, ...] | None = None
    """Entry of the first dimension to select after the pattern; several entries, in their new order; None for all."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of the pattern's dimensions."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the other library's tensor, rearranged, or the selected entries of it."""
        rearranged = repeat(x, self.pattern, **self.sizes) if self.pattern else x
        if self.index is None:
            return rearranged
        return rearranged[list(self.index) if isinstance(self.index, tuple) else self.index]

    @property
    def action(self) -> str:
        """A short description of the rearrangement, for the printed plan."""
        sizes = ", ".join(f"{name} = {size}" for name, size in self.sizes.items() if name in self.pattern)
        if isinstance(self.index, tuple):
            return f"rows {_format_rows(self.index)}"
        entry = "" if self.index is None else f", entry {self.index}"
        return f"{self.pattern}{f' ({sizes})' if sizes else ''}{entry}" if self.pattern else "as it is"


def part(name: str, *shape: int, pattern: str = "", index: int | tuple[int, ...] | None = None, **sizes: int) -> Part:
    """Make a `Part` of the other library's tensor with this name and shape; `sizes` are the pattern's dimensions."""
    return Part(name, shape, pattern, index, sizes)


@dataclass(frozen=True)
class Rule:
    """Origin of a seqmix tensor: parts concatenated along `dim`, or zeros if there are no parts."""

    name: str
    """Name of the seqmix tensor."""
    shape: tuple[int, ...]
    """Shape of the seqmix tensor."""
    parts: tuple[Part, ...]
    """Parts of the other library's tensors; empty for zeros."""
    dim: int = 0
    """Dimension along which the parts are concatenated."""

    def __call__(self, theirs: Mapping[str, Tensor]) -> Tensor:
        """Compute the seqmix tensor from the other library's tensors."""
        tensors = [part(theirs[part.name]) for part in self.parts]
        if not tensors:
            return torch.zeros(self.shape)
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, self.dim)

    @property
    def sources(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the other library's tensors that this rule reads."""
        return {part.name: part.shape for part in self.parts}


def to_ours(
    rules: Iterable[Rule], theirs: Mapping[str, Tensor], where: object, ignored_tensors: str, copies: Mapping[str, str]
) -> dict[str, Tensor]:
    """Compute all tensors of a seqmix model from the other library's tensors.

    Args:
        rules: the rule of every seqmix tensor.
        theirs: the other library's tensors by name.
        where: name of their folder in messages.
        ignored_tensors: regular expression of names to ignore: buffers that the library computes.
        copies: names of tied tensors that may be saved a second time, and the tensors that they must equal.

    Raises:
        SeqmixError: a tensor is missing, has a shape that does not match config.json, or is not used by any rule.
    """
    rules = list(rules)
    sources = {name: shape for rule in rules for name, shape in rule.sources.items()}
    for name, shape in sources.items():
        if name not in theirs:
            raise SeqmixError(f"{where} lacks the tensor {name}, of shape {list(shape)}{nearest_hint(name, theirs)}")
        if theirs[name].shape != shape:
            raise SeqmixError(
                f"{where}: the tensor {name} must have shape {list(shape)} according to config.json, got "
                f"{list(theirs[name].shape)}"
            )
    for name in sorted(theirs.keys() - sources.keys()):
        if name in copies and torch.equal(theirs[name], theirs[copies[name]]):
            continue
        if not re.fullmatch(ignored_tensors, name):
            raise SeqmixError(
                f"{where} has a tensor without a counterpart in seqmix: {name} of shape {list(theirs[name].shape)}"
            )
    return {rule.name: rule(theirs).contiguous() for rule in rules}


def to_theirs(rules: Iterable[Rule], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute all tensors of the other library's model from those of a seqmix model.

    Raises:
        SeqmixError: a seqmix tensor has different values where the other library has one shared value, or is not zero
            although the other library has no such tensor.
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
        # apply the rule to tensors of positions: the result says where each number of x comes from
        positions = torch.arange(sum(sizes.values())).split(list(sizes.values()))
        places = {name: flat.view(rule.sources[name]) for name, flat in zip(sizes, positions, strict=True)}
        origins = rule(places).flatten()
        numbers = x.new_zeros(sum(sizes.values()))
        numbers[origins] = x.flatten()
        is_set = torch.zeros(sum(sizes.values()), dtype=torch.bool)
        is_set[origins] = True
        for name, place in places.items():
            theirs.setdefault(name, x.new_zeros(place.shape))[is_set[place]] = numbers[place][is_set[place]]
            missing[name] = missing.get(name, torch.ones(place.shape, dtype=torch.bool)) & ~is_set[place]
    for rule in rules:
        if not torch.equal(rule(theirs), ours[rule.name]):
            raise SeqmixError(
                f"{rule.name} has different values for heads that share one part of {', '.join(rule.sources)}"
                if rule.parts
                else f"{rule.name} must be zero, because the other library has no such tensor"
            )
    assert not any(places.any() for places in missing.values()), "a declaration leaves a part of a tensor out"
    return {name: x.contiguous() for name, x in theirs.items()}


def plan(rules: Iterable[Rule]) -> list[tuple[str, str, str, str]]:
    """Return the lines of the printed conversion plan; tensors of like layers and experts share a line.

    Each line has a seqmix tensor, its shape, the other library's tensor with its shape, and the rearrangement.
    """
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for rule in rules:
        layer = re.search(r"\.(\d+)\.", rule.name)
        last = 0
        for (source, shape, action), equal_parts in groupby(rule.parts, key=lambda x: _describe(x, bool(layer))):
            first = last + 1
            last = last + len(list(equal_parts))
            numbers = f"{first} to {last}" if last > first else f"{first}"
            heading = f"part {numbers} of {len(rule.parts)}: " if len(rule.parts) > 1 else ""
            name = re.sub(r"\.\d+\.", ".N.", rule.name, count=1)
            row = (name, _format_shape(rule.shape), f"{source} {_format_shape(shape)}", heading + action)
            rows.setdefault(row, []).extend([layer[1]] if layer else [])
    return [(_insert_layers(row[0], layers), *row[1:]) for row, layers in rows.items()]


def _describe(source: Part, has_layer: bool) -> tuple[str, tuple[int, ...], str]:
    """Return a part's tensor name without layer and expert numbers, its shape, and its rearrangement."""
    name = re.sub(r"\.\d+\.", ".N.", source.name, count=1) if has_layer else source.name
    return re.sub(r"(\.experts)\.\d+\.", r"\1.E.", name), source.shape, source.action


def _format_rows(index: tuple[int, ...]) -> str:
    """Format row numbers as ranges, at most four."""
    starts = [i for i, row in enumerate(index) if i == 0 or row != index[i - 1] + 1]
    ends = [*(i - 1 for i in starts[1:]), len(index) - 1]
    ranges = [f"{index[i]}-{index[j]}" if j > i else f"{index[i]}" for i, j in zip(starts, ends, strict=True)]
    return ", ".join(ranges[:4]) + (", ..." if len(ranges) > 4 else "")


def _insert_layers(name: str, layers: list[str]) -> str:
    """Replace the N in a name by the numbers of the layers that it stands for."""
    numbers = ",".join(layers) if len(layers) < 4 else f"{layers[0]},{layers[1]},...,{layers[-1]}"
    return name.replace(".N.", f".{{{numbers}}}." if len(layers) > 1 else f".{numbers}.", 1)


def _format_shape(shape: tuple[int, ...]) -> str:
    return f"[{' '.join(map(str, shape))}]"
