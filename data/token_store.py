"""Documents as tokens, in memory or in memory-mapped files, concatenated to one stream."""

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
    digest: int
    """64 bits of a hash of its text."""
    size: int
    """Size of its text in bytes."""
    tokens: np.ndarray


class Store(Protocol):
    """Concatenated documents, each of which starts with a begin token."""

    ends: np.ndarray
    """Where each document ends, [N], int64."""
    digests: np.ndarray
    """64 bits of a hash of each document's text, [N], uint64."""
    names: np.ndarray
    """64 bits of a hash of the name of each document's file, [N], uint64."""
    bytes: int
    """Size of all texts in bytes."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1."""
        ...

    def name_of(self, number: int) -> str:
        """Where a document is to be found, for messages."""
        ...


class Stream:
    """Concatenated pieces of stores, of which each has starts and stops [N 2]. The first token of every piece reads as
    the begin token.

    A slice is an array; the rest is not loaded.
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
        """Where the documents start, [N]."""
        return np.concatenate(([0], self._ends[:-1])) if len(self._ends) else self._ends

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(len(self))
        found = []
        at = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            opened, end = self._pieces[at].tolist()
            length = end - opened
            skipped = start - (int(self._ends[at]) - length)
            taken = min(length - skipped, stop - start)
            tokens = self._stores[self._store_of[at]].read(opened + skipped, opened + skipped + taken)
            if not skipped:
                tokens[0] = self._begin
            found.append(tokens)
            start = start + taken
            at = at + 1
        return np.concatenate(found) if found else np.array([], dtype=np.uint16)


def tokenized(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[TokenDocument]:
    """The documents as tokens, in order."""
    texts, encoded = tee(documents)
    found = tokenizer.encode_documents((document.name, document.text) for document in encoded)
    for document, tokens in zip(texts, found, strict=True):
        yield TokenDocument(document.file, digest(document.text), len(document.text), tokens)


def digest(text: bytes) -> int:
    """64 bits of a hash of the text."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
