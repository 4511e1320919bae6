"""Tensors in safetensors files: whole, or split into chunks over the files of several processes.

The metadata of a file of chunks has the offset of each chunk in its tensor, under the key that torch's distributed
checkpoint reads (`HuggingFaceStorageReader`). Nothing here communicates, and nothing is pickled.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..registry import DataError, replacing

CHECKSUM_KEY = "seqmix.sha256"
"""Key of the checksum in a file's metadata."""
OFFSETS_METADATA = "DCP_SHARDING_INFO"
OFFSETS_KEY = "saved_offsets"


class CheckpointError(DataError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class Chunk(NamedTuple):
    """A block of a tensor, or the whole tensor."""

    values: Tensor
    """Values of the block."""
    begin: tuple[int, ...]
    """Index of the block's first value in each dimension of the whole tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""

    @classmethod
    def whole(cls, tensor: Tensor) -> "Chunk":
        """Return a whole tensor as one chunk."""
        return cls(tensor, (0,) * tensor.ndim, tuple(tensor.shape))

    def overlap(self, other: "Chunk") -> tuple[Tensor, Tensor]:
        """Return the overlap with another chunk of the same tensor, as a view of this chunk and a view of the other."""
        first = [max(each) for each in zip(self.begin, other.begin, strict=True)]
        ends = zip(self.begin, self.values.shape, other.begin, other.values.shape, strict=True)
        last = [max(min(a + n, b + m), at) for (a, n, b, m), at in zip(ends, first, strict=True)]
        ours, theirs = (
            chunk.values[tuple(slice(i - b, j - b) for i, j, b in zip(first, last, chunk.begin, strict=True))]
            for chunk in (self, other)
        )
        return ours, theirs


def write_chunks(file: Path, chunks: Mapping[str, Chunk], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of chunks. An existing file is replaced once the new one is flushed to disk.

    Raises:
        CheckpointError: the file cannot be written.
    """
    begins = {name: {OFFSETS_KEY: chunk.begin} for name, chunk in chunks.items()}
    if any(chunk.values.shape != chunk.shape for chunk in chunks.values()):
        metadata = {**metadata, OFFSETS_METADATA: json.dumps(begins)}
    try:
        with replacing(file) as partial:
            save_file({name: chunk.values.contiguous() for name, chunk in chunks.items()}, partial, dict(metadata))
    except Exception as error:  # safetensors raises its own error for a full disk
        raise CheckpointError(f"{file} cannot be written: {error}") from error


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of whole tensors, like `write_chunks`."""
    write_chunks(file, {name: Chunk.whole(tensor) for name, tensor in tensors.items()}, metadata)


def seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file of these tensors with a checksum of both, for `verify_seal`."""
    return {**metadata, CHECKSUM_KEY: checksum(tensors, _text_of(metadata))}


def verify_seal(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Check a file against the checksum in its metadata; files of older versions have none.

    Raises:
        CheckpointError: the tensors or the metadata have changed.
    """
    if CHECKSUM_KEY in metadata and metadata[CHECKSUM_KEY] != checksum(tensors, _text_of(metadata)):
        raise CheckpointError(
            f"{file} is damaged: its checksum does not match; export the run again, or delete {CHECKSUM_KEY} from its "
            "metadata if you have changed it yourself"
        )


def _text_of(metadata: Mapping[str, str]) -> str:
    """Return metadata without the checksum as text, independent of the order."""
    return json.dumps({key: metadata[key] for key in sorted(metadata) if key != CHECKSUM_KEY})


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return a SHA-256 of a text and of the tensors' names, dtypes, shapes and values."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_chunks(files: Sequence[Path]) -> tuple[dict[str, list[Chunk]], dict[str, str]]:
    """Read the chunks of each tensor, by name, and the metadata of the last file.

    The values are memory-mapped: they are read from disk when they are used.

    Raises:
        CheckpointError: a file is missing or not a safetensors file, or a part of a tensor is missing.
    """
    loaded: dict[str, list[tuple[Tensor, tuple[int, ...]]]] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing" if not file.exists() else f"{file} is not a file")
        try:
            with safe_open(file, "pt") as tensors:
                metadata = tensors.metadata() or {}
                begins = json.loads(metadata.get(OFFSETS_METADATA, "{}"))
                for name in tensors.keys():  # noqa: SIM118 not a mapping
                    values = tensors.get_tensor(name)
                    begin = tuple(begins[name][OFFSETS_KEY]) if begins else (0,) * values.ndim
                    if len(begin) != values.ndim or any(type(at) is not int or at < 0 for at in begin):
                        raise ValueError(f"a chunk of {_quote_name(name)} begins at {begin!r:.80}")
                    loaded.setdefault(name, []).append((values, begin))
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from error
    ends = {
        name: [[at + n for at, n in zip(begin, values.shape, strict=True)] for values, begin in chunks]
        for name, chunks in loaded.items()
    }
    shapes = {name: tuple(map(max, zip(*each, strict=True))) for name, each in ends.items()}
    by_name = {name: [Chunk(*chunk, shapes[name]) for chunk in chunks] for name, chunks in loaded.items()}
    for name, chunks in by_name.items():
        if sum(chunk.values.numel() for chunk in chunks) != prod(shapes[name]) or _have_overlap(chunks):
            raise CheckpointError(
                f"{_quote_files(files)} has parts of {_quote_name(name)} that do not make up the whole tensor"
            )
        if len({chunk.values.dtype for chunk in chunks}) > 1:
            raise CheckpointError(
                f"{_quote_files(files)} is damaged: its parts of {_quote_name(name)} have several dtypes"
            )
    return by_name, metadata


def _have_overlap(chunks: Sequence[Chunk]) -> bool:
    """Return True if two chunks of a tensor overlap: then a part may be missing although the sizes add up."""
    ordered = sorted(chunks, key=lambda chunk: chunk.begin)
    for number, chunk in enumerate(ordered):
        for other in ordered[number + 1 :]:
            if other.begin[0] >= chunk.begin[0] + len(chunk.values):
                break
            if chunk.overlap(other)[0].numel():
                return True
    return False


class Tensors(Mapping[str, Tensor]):
    """Whole tensors by name; each one is assembled from its chunks on access."""

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
    """Read whole tensors by name, and the metadata of the last file.

    Raises:
        CheckpointError: as for `read_chunks`.
    """
    chunks, metadata = read_chunks(files)
    return Tensors(chunks), metadata


def fill(files: Sequence[Path], wanted: Mapping[str, Chunk]) -> None:
    """Copy the values in files into the `wanted` chunks; the files may divide the tensors differently.

    Raises:
        CheckpointError: as for `read_chunks`; or names, shapes or dtypes do not fit. Then nothing is copied.
    """
    chunks = read_chunks(files)[0]
    require_same_names(files, chunks, wanted)
    for name, chunk in wanted.items():
        if (shape := chunks[name][0].shape) != chunk.shape:
            raise CheckpointError(
                f"{_quote_files(files)} belongs to another model: expected its {name} to have shape "
                f"{list(chunk.shape)}, got {list(shape)}"
            )
        saved_dtype = chunks[name][0].values.dtype
        dtype = chunk.values.dtype
        # floats may be of another dtype than saved, but other integers could wrap
        if saved_dtype != dtype and not (saved_dtype.is_floating_point and dtype.is_floating_point):
            raise CheckpointError(
                f"{_quote_files(files)} is damaged: expected its {name} to be {dtype}, got {saved_dtype}"
            )
    for name, chunk in wanted.items():
        _copy(chunk, chunks[name])


@torch.no_grad()
def _copy(wanted: Chunk, chunks: Sequence[Chunk]) -> None:
    for chunk in chunks:
        ours, theirs = wanted.overlap(chunk)
        ours.copy_(theirs)


def require_same_names(files: Sequence[Path], present: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Check that files have exactly the wanted tensors, by name.

    Raises:
        CheckpointError: a tensor is missing, or there is an additional one.
    """
    missing = wanted.keys() - present.keys()
    additional = present.keys() - wanted.keys()
    for names, sentence in ((missing, "it lacks {}"), (additional, "it has an additional {}")):
        if names:
            and_more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(
                f"{_quote_files(files)} belongs to another model: {sentence.format(_quote_name(min(names)))}{and_more}"
            )


def _quote_name(name: str) -> str:
    """Return the name of a tensor from an untrusted file, printable and short."""
    return (name if name.isprintable() else ascii(name))[:80]


def _quote_files(files: Sequence[Path]) -> str:
    """Return the first file's name and the number of further files."""
    first, *rest = files
    return f"{first} (and {len(rest)} more)" if rest else str(first)
