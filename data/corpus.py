"""A text as two token streams: the training split and the validation split."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from ..models import ByteTokenizer, Tokenizer
from ..registry import SeqmixError
from .corpus_config import CorpusConfig
from .files import TOKENS, read_documents, source_files, source_name
from .formats import has_rows
from .stream import Store, Stream, digest, tokenized
from .token_file import TokenFile

Tokens: TypeAlias = np.ndarray | Stream
"""A token stream, in memory or mapped: it has a length, and its slices are arrays."""
COUNTED = 2**24
"""Maximum number of tokens for token frequencies."""


@dataclass(frozen=True)
class Corpus:
    """A text with its training and validation split."""

    name: str
    documents: int
    split: str
    train: Tokens
    validation: Tokens
    tokenizer: Tokenizer = field(default_factory=ByteTokenizer)
    bytes_per_token: float = 1.0
    """Over the whole text, without begin tokens: 1 for bytes."""
    digest: str | None = None
    """A hash of documents, tokenizer and split."""

    @property
    def unigram_entropy(self) -> float:
        """Nats per token of the validation split under its own token frequencies, from its first `COUNTED` tokens."""
        begin = self.tokenizer.begin
        counts = np.bincount(self.validation[:COUNTED], minlength=begin)[:begin]
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())


def read_corpus(config: CorpusConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Read and split a text. Token files are memory-mapped; everything else is tokenized into memory.

    Args:
        config: the text.
        tokenizer: the configured one when None.

    Raises:
        SeqmixError: a source is missing, unreadable, empty, or shorter than a sequence.
    """
    name, tokenizer = source_name(config), tokenizer or config.tokenizer_of()
    files = list(source_files(config))
    mapped = any(path.suffix == TOKENS for _, path in files)
    stores = _mapped(files, tokenizer) if mapped else [_InMemory(config, tokenizer)]
    count = sum(len(store.ends) for store in stores)
    split = config.split
    if split == "auto":  # by_file is by_document where every file is one document
        several = mapped or config.dataset is not None or any(has_rows(path, config.text_field) for _, path in files)
        split = "tail" if count == 1 else "by_document" if several else "by_file"
    splits = [_split(store, split, config.validation_fraction) for store in stores]
    identity = hashlib.sha256(tokenizer.identity.encode())
    for store, pieces in zip(stores, splits, strict=True):
        for table in (store.digests, *pieces):
            identity.update(table.tobytes())
    streams = [Stream(list(zip(stores, pieces, strict=True)), tokenizer.begin) for pieces in zip(*splits, strict=True)]
    train, validation = (s if mapped else s[:].astype(tokenizer.dtype, copy=False) for s in streams)
    for part, tokens in (("training", train), ("validation", validation)):
        if len(tokens) <= config.sequence_length:
            raise SeqmixError(
                f"the {part} split of {name} has {len(tokens)} tokens, and a sequence with its last target needs "
                f"{config.sequence_length + 1}: lower data.sequence_length, give more text, or change the split "
                f"(data.split is {split}: by_document holds out whole documents, by_file whole files, tail the end of "
                "each document)"
            )
    text_tokens = sum(int(store.ends[-1]) for store in stores) - count
    bytes_per_token = sum(store.bytes for store in stores) / max(text_tokens, 1)
    return Corpus(name, count, split, train, validation, tokenizer, bytes_per_token, identity.hexdigest())


class _InMemory:
    """Documents in memory."""

    def __init__(self, config: CorpusConfig, tokenizer: Tokenizer) -> None:
        documents = list(tokenized(read_documents(config), tokenizer))
        if not documents:
            raise SeqmixError(f"the corpus is empty: no text in {source_name(config)} (glob {config.glob})")
        begin = np.array([tokenizer.begin], dtype=tokenizer.dtype)
        self._tokens = np.concatenate([part for document in documents for part in (begin, document.tokens)])
        self.ends = np.cumsum([len(document.tokens) + 1 for document in documents], dtype=np.int64)
        self.digests = np.array([document.digest for document in documents], dtype=np.uint64)
        self.names = np.array([digest(document.file.encode()) for document in documents], dtype=np.uint64)
        self.bytes = sum(document.size for document in documents)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._tokens[start:stop].copy()


def _mapped(files: Sequence[tuple[str, Path]], tokenizer: Tokenizer) -> list[TokenFile]:
    """The token files, which cannot be mixed with text."""
    if texts := [path for _, path in files if path.suffix != TOKENS]:
        other = next(path for _, path in files if path.suffix == TOKENS)
        raise SeqmixError(
            f"token files and text cannot be mixed: {other} is a token file, and {texts[0]} is not; "
            "tokenize the text too, or select files with data.glob"
        )
    return [TokenFile(path, tokenizer, name) for name, path in files]


def _split(
    store: Store, split: Literal["by_document", "by_file", "tail"], fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """The pieces of a store for training, and for validation (a share `fraction`); each [N 2]."""
    starts = np.concatenate(([0], store.ends[:-1]))
    if split == "tail":
        # a document of n tokens follows a begin token; another begin token replaces the token before the cut
        cuts = starts + ((store.ends - starts - 1) * (1 - fraction)).astype(np.int64)
        return np.stack((starts, cuts + 1), axis=1), np.stack((cuts, store.ends), axis=1)
    shares = (store.digests if split == "by_document" else store.names) / 2.0**64
    pieces, validation = np.stack((starts, store.ends), axis=1), shares < fraction
    return pieces[~validation], pieces[validation]
