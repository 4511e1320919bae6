"""Tensors in safetensors files: whole, or in the chunks of several processes.

A file of chunks says in its metadata where each begins, under the key that torch's distributed checkpoint reads
(`HuggingFaceStorageReader`). Nothing here communicates, and nothing is pickled.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..registry import SeqmixError, replacing

BEGINS = "DCP_SHARDING_INFO"
BEGIN = "saved_offsets"


class CheckpointError(SeqmixError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class Chunk(NamedTuple):
    """A block of a tensor, or all of it."""

    values: Tensor
    begin: tuple[int, ...]
    """Its first index in each dimension of the tensor."""
    shape: tuple[int, ...]
    """Of the tensor."""

    @classmethod
    def whole(cls, tensor: Tensor) -> "Chunk":
        """All of a tensor."""
        return cls(tensor, (0,) * tensor.ndim, tuple(tensor.shape))

    def overlap(self, other: "Chunk") -> tuple[Tensor, Tensor]:
        """The values that this chunk and another one of the same tensor both have, as views of each."""
        first = [max(each) for each in zip(self.begin, other.begin, strict=True)]
        ends = zip(self.begin, self.values.shape, other.begin, other.values.shape, strict=True)
        last = [max(min(a + n, b + m), at) for (a, n, b, m), at in zip(ends, first, strict=True)]
        ours, theirs = (
            chunk.values[tuple(slice(i - b, j - b) for i, j, b in zip(first, last, chunk.begin, strict=True))]
            for chunk in (self, other)
        )
        return ours, theirs


def write_chunks(file: Path, chunks: Mapping[str, Chunk], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; it replaces an older one when it is complete and flushed to disk.

    Raises:
        CheckpointError: it cannot be written.
    """
    begins = {name: {BEGIN: chunk.begin} for name, chunk in chunks.items()}
    if any(chunk.values.shape != chunk.shape for chunk in chunks.values()):
        metadata = {**metadata, BEGINS: json.dumps(begins)}
    try:
        with replacing(file) as partial:
            save_file({name: chunk.values.contiguous() for name, chunk in chunks.items()}, partial, dict(metadata))
    except Exception as error:  # safetensors raises its own error for a full disk
        raise CheckpointError(f"{file} cannot be written: {error}") from error


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """The same for whole tensors."""
    write_chunks(file, {name: Chunk.whole(tensor) for name, tensor in tensors.items()}, metadata)


def read_chunks(files: Sequence[Path]) -> tuple[dict[str, list[Chunk]], dict[str, str]]:
    """All chunks by their tensors' names, and the metadata; values are read from disk when they are used.

    Raises:
        CheckpointError: a file is missing or not of safetensors, or a part of a tensor is missing.
    """
    found: dict[str, list[tuple[Tensor, tuple[int, ...]]]] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing" if not file.exists() else f"{file} is not a file")
        try:
            with safe_open(file, "pt") as tensors:
                metadata = tensors.metadata() or {}
                begins = json.loads(metadata.get(BEGINS, "{}"))
                for name in tensors.keys():  # noqa: SIM118 not a mapping
                    values = tensors.get_tensor(name)
                    begin = tuple(begins[name][BEGIN]) if begins else (0,) * values.ndim
                    if len(begin) != values.ndim or any(type(at) is not int or at < 0 for at in begin):
                        raise ValueError(f"a chunk of {_shown(name)} begins at {begin!r:.80}")
                    found.setdefault(name, []).append((values, begin))
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from error
    ends = {
        name: [[at + n for at, n in zip(begin, values.shape, strict=True)] for values, begin in chunks]
        for name, chunks in found.items()
    }
    shapes = {name: tuple(map(max, zip(*each, strict=True))) for name, each in ends.items()}
    whole = {name: [Chunk(*chunk, shapes[name]) for chunk in chunks] for name, chunks in found.items()}
    for name, chunks in whole.items():
        if sum(chunk.values.numel() for chunk in chunks) != prod(shapes[name]) or _overlapping(chunks):
            raise CheckpointError(f"{_all(files)} has parts of {_shown(name)} that do not make the whole")
        if len({chunk.values.dtype for chunk in chunks}) > 1:
            raise CheckpointError(f"{_all(files)} is damaged: it has parts of {_shown(name)} of several types")
    return whole, metadata


def _overlapping(chunks: Sequence[Chunk]) -> bool:
    """Whether two chunks of a tensor have a value in common: then others may be missing that no sum of sizes shows."""
    ordered = sorted(chunks, key=lambda chunk: chunk.begin)
    for number, chunk in enumerate(ordered):
        for other in ordered[number + 1 :]:
            if other.begin[0] >= chunk.begin[0] + len(chunk.values):
                break
            if chunk.overlap(other)[0].numel():
                return True
    return False


class Tensors(Mapping[str, Tensor]):
    """Whole tensors, each put together from its chunks when it is asked for."""

    def __init__(self, chunks: Mapping[str, Sequence[Chunk]]) -> None:
        self.chunks = chunks

    def __getitem__(self, name: str) -> Tensor:
        first, *rest = self.chunks[name]
        if not rest:
            return first.values
        whole = Chunk.whole(first.values.new_empty(first.shape))
        _copy(whole, self.chunks[name])
        return whole.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)


def read_tensors(files: Sequence[Path]) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """All tensors and the metadata.

    Raises:
        CheckpointError: as `read_chunks`.
    """
    chunks, metadata = read_chunks(files)
    return Tensors(chunks), metadata


def fill(files: Sequence[Path], wanted: Mapping[str, Chunk]) -> None:
    """Copy into chunks what files have of them, whatever chunks the files have.

    Raises:
        CheckpointError: as `read_chunks`; or, before any copy, they differ in more than values.
    """
    chunks = read_chunks(files)[0]
    require_same_names(files, chunks, wanted)
    for name, chunk in wanted.items():
        if (shape := chunks[name][0].shape) != chunk.shape:
            raise CheckpointError(
                f"{_all(files)} belongs to another model: its {name} has shape {list(shape)} "
                f"instead of {list(chunk.shape)}"
            )
        found = chunks[name][0].values
        ours = chunk.values
        if found.is_floating_point() != ours.is_floating_point():
            raise CheckpointError(f"{_all(files)} is damaged: its {name} is {found.dtype}, and not {ours.dtype}")
    for name, chunk in wanted.items():
        _copy(chunk, chunks[name])


@torch.no_grad()
def _copy(wanted: Chunk, chunks: Sequence[Chunk]) -> None:
    for chunk in chunks:
        ours, theirs = wanted.overlap(chunk)
        ours.copy_(theirs)


def require_same_names(files: Sequence[Path], found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Refuse files that lack a tensor, or have another one.

    Raises:
        CheckpointError: they do.
    """
    lacking = wanted.keys() - found.keys()
    extra = found.keys() - wanted.keys()
    for names, sentence in ((lacking, "it lacks {}"), (extra, "it has an additional {}")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(
                f"{_all(files)} belongs to another model: {sentence.format(_shown(min(names)))}{more}"
            )


def _shown(name: str) -> str:
    """A name that a file gives a tensor, as part of a sentence."""
    return (name if name.isprintable() else ascii(name))[:80]


def _all(files: Sequence[Path]) -> str:
    """The names of all files in a sentence."""
    first, *rest = files
    return f"{first} (and {len(rest)} more)" if rest else str(first)
