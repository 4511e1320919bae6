"""Tokenized documents, in memory or in memory-mapped files, concatenated to one stream."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import tee
from typing import NamedTuple, Protocol

import numpy as np

from ..models import Tokenizer
from .files import Document


class TokenDocument(NamedTuple):
    """A document as tokens, without the begin token."""

    file: str
    """File name relative to the configured folder, or the dataset's path."""
    digest: int
    """64-bit hash of the document's text."""
    size: int
    """Size of the document's text in bytes."""
    tokens: np.ndarray


class Store(Protocol):
    """Concatenated documents, each of which starts with a begin token."""

    ends: np.ndarray
    """End of each document, exclusive, int64 [N]."""
    digests: np.ndarray
    """64-bit hash of each document's text, uint64 [N]."""
    names: np.ndarray
    """64-bit hash of the name of each document's file, uint64 [N]."""
    bytes: int
    """Size of all texts in bytes."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return a copy of the tokens `start` to `stop - 1`."""
        ...

    def name_of(self, number: int) -> str:
        """Return where the document with this number comes from, for messages, such as "corpus.tokens, document 3"."""
        ...


class Stream:
    """Concatenated pieces of stores. The first token of every piece reads as the begin token.

    Slicing reads that part of the tokens only, and returns it as an array.

    Args:
        parts: each store, with the start and stop of its pieces [N 2].
        begin: the begin token.
    """

    def __init__(self, parts: Sequence[tuple[Store, np.ndarray]], begin: int) -> None:
        self._stores = [store for store, _ in parts]
        self._pieces = np.concatenate([pieces for _, pieces in parts])
        self._store_of = np.repeat(np.arange(len(parts)), [len(pieces) for _, pieces in parts])
        self._ends = np.diff(self._pieces).ravel().cumsum()
        self._begin = begin

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def starts(self) -> np.ndarray:
        """Position of the first token of each piece, [N]."""
        return np.concatenate(([0], self._ends[:-1])) if len(self._ends) else self._ends

    def __getitem__(self, positions: slice) -> np.ndarray:
        start, stop, _ = positions.indices(len(self))
        chunks = []
        piece = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            piece_start, piece_end = self._pieces[piece].tolist()
            length = piece_end - piece_start
            offset = start - (int(self._ends[piece]) - length)
            count = min(length - offset, stop - start)
            tokens = self._stores[self._store_of[piece]].read(piece_start + offset, piece_start + offset + count)
            if offset == 0:
                tokens[0] = self._begin
            chunks.append(tokens)
            start = start + count
            piece = piece + 1
        return np.concatenate(chunks) if chunks else np.array([], dtype=np.uint16)


def tokenized(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[TokenDocument]:
    """Tokenize documents lazily and in order."""
    texts, to_encode = tee(documents)
    encoded = tokenizer.encode_documents((document.name, document.text) for document in to_encode)
    for document, tokens in zip(texts, encoded, strict=True):
        yield TokenDocument(document.file, digest(document.text), len(document.text), tokens)


def digest(text: bytes) -> int:
    """Return the first 64 bits of the SHA-256 of a text."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
