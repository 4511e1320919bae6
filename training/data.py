"""Text as two streams of tokens, one to learn and one held out, and the batches cut from them.

A batch is a function of (seed, step) alone, so a resumed run sees what the unbroken one would have seen.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ..models import IGNORED, ByteTokenizer
from ..registry import SeqmixError
from .config import DataConfig


class Batch(NamedTuple):
    """Tokens, and the token behind each."""

    inputs: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    """`IGNORED` where nothing is to be predicted: behind the last token of a document."""


@dataclass(frozen=True)
class Corpus:
    """A text, split."""

    name: str
    files: int
    split: str
    train: np.ndarray
    """Tokens, uint16."""
    validation: np.ndarray
    """Tokens, uint16."""

    @property
    def unigram_entropy(self) -> float:
        """Nats a byte of the validation text for a model that knows its byte frequencies and nothing else."""
        counts = np.bincount(self.validation, minlength=ByteTokenizer.vocab_size)[: ByteTokenizer.begin]
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())


def read_corpus(config: DataConfig) -> Corpus:
    """Read and split a text.

    Raises:
        SeqmixError: a path is missing or cannot be read, nothing is there, or it is too short for a sequence.
    """
    name = ", ".join(config.paths) if config.paths else "the source of Python's standard library"
    documents = list(_documents(config)) if config.paths else list(_standard_library())
    documents = [(key, text) for key, text in documents if text]
    if not documents:
        raise SeqmixError(f"the corpus is empty: no text in {name} (glob {config.glob})")
    split = config.split
    if split == "auto":
        split = "by_file" if len(documents) > 1 else "tail"
    if split == "by_file":
        held_out = [_share(key) < config.validation_fraction for key, _ in documents]
        train = [text for (_, text), held in zip(documents, held_out, strict=True) if not held]
        validation = [text for (_, text), held in zip(documents, held_out, strict=True) if held]
    else:
        cuts = [int(len(text) * (1 - config.validation_fraction)) for _, text in documents]
        train = [text[:cut] for (_, text), cut in zip(documents, cuts, strict=True)]
        validation = [text[cut:] for (_, text), cut in zip(documents, cuts, strict=True)]
    corpus = Corpus(name, len(documents), split, _tokens(train), _tokens(validation))
    for part, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens) <= config.sequence_length:
            raise SeqmixError(
                f"the {part} text of {name} has {len(tokens)} tokens, and a sequence with its last target needs "
                f"{config.sequence_length + 1}: lower data.sequence_length, give more text, "
                f"or split otherwise (data.split is {split}: by_file holds out whole files, tail the end of each)"
            )
    return corpus


def training_batch(tokens: np.ndarray, length: int, batch_size: int, *, seed: int, step: int) -> Batch:
    """The sequences of one step, from random places of the stream."""
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - length, size=batch_size)
    return _cut(tokens, starts, length)


def evaluation_batches(tokens: np.ndarray, length: int, batch_size: int, limit: int | None) -> Iterator[Batch]:
    """Sequences side by side over the stream, all or `limit` batches spread evenly; the last batch is padded."""
    starts = np.arange(0, len(tokens) - length, length)
    if limit is not None and limit * batch_size < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, limit * batch_size).round().astype(int)]
    for at in range(0, len(starts), batch_size):
        part = starts[at : at + batch_size]
        batch = _cut(tokens, np.resize(part, batch_size), length)
        batch.targets[len(part) :] = IGNORED
        yield batch


def _cut(tokens: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    windows = torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64))
    targets = windows[:, 1:].clone()
    return Batch(windows[:, :-1].contiguous(), targets.masked_fill_(targets == ByteTokenizer.begin, IGNORED))


def _tokens(documents: list[bytes]) -> np.ndarray:
    begin = np.array([ByteTokenizer.begin], dtype=np.uint16)
    parts = [part for text in documents for part in (begin, np.frombuffer(text, dtype=np.uint8).astype(np.uint16))]
    return np.concatenate(parts) if parts else begin[:0]


def _share(key: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _documents(config: DataConfig) -> Iterator[tuple[str, bytes]]:
    for given in config.paths or ():
        try:
            path = Path(given).expanduser()
            if not path.exists():
                hint = "; data.glob chooses files inside a folder" if "*" in given else ""
                raise SeqmixError(f"the corpus {given} does not exist{hint}")
            files = [path] if path.is_file() else sorted(p for p in path.glob(config.glob) if p.is_file())
            for file in files:
                key = file.name if file == path else file.relative_to(path).as_posix()
                if file == path or not any(part.startswith(".") for part in Path(key).parts):
                    yield key, file.read_bytes()
        except OSError as error:
            raise SeqmixError(f"the corpus {given} cannot be read: {error.filename}: {error.strerror}") from error
        except RuntimeError as error:
            raise SeqmixError(f"the corpus {given} cannot be found: {error}") from error


def _standard_library() -> Iterator[tuple[str, bytes]]:
    """Python's own modules, without tests, installed packages and files made for one machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if {"site-packages", "dist-packages", "test", "tests", "__pycache__"}.isdisjoint(parts) and not parts[
            -1
        ].startswith("_sysconfigdata"):
            yield "/".join(parts), file.read_bytes()
