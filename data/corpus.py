"""A text as two token streams: the training split and the validation split."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from os import fsencode
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ..models import ByteTokenizer, Tokenizer
from ..registry import SeqmixError
from .corpus_config import CorpusConfig, DocumentsConfig
from .files import TOKENS, read_documents, source_files, source_name
from .formats import has_rows
from .sequences import Tokens
from .token_file import TokenFile
from .token_store import Store, Stream, digest, tokenized

_Part: TypeAlias = tuple[Store, np.ndarray]
"""A store, and the start and end of the pieces of it, [N 2]."""
OWN = "data.validation"
"""The split where the validation split is documents of its own."""
COUNTED = 2**24
"""Maximum number of tokens for token frequencies."""
READ = 2**16
"""Tokens that are searched for text at once."""


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
    parts: tuple[int, ...] | None = None
    """Training tokens of each source, 0 of a streamed one; None if there is one source."""
    stores: Mapping[str, Sequence[_Part]] = field(default_factory=dict)
    """What the training and the validation split were made of."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Training tokens of each source, end to end in `train`; 0 of a streamed one."""
        return (len(self.train),) if self.parts is None else self.parts

    @property
    def unigram_entropy(self) -> float:
        """Nats per token of the validation split under its own token frequencies, from its first `COUNTED` tokens."""
        counts = np.bincount(self.validation[:COUNTED], minlength=self.tokenizer.begin + 1)
        counts[self.tokenizer.begin] = 0  # it is not predicted
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def origin(self, position: int, split: str = "training") -> str | None:
        """The document of a token of a split, and the token's number in it; None if unknown. Text is read again."""
        for store, pieces in self.stores.get(split, ()):
            ends = np.diff(pieces).ravel().cumsum()
            if len(ends) and position < ends[-1]:
                piece = np.searchsorted(ends, position, side="right")
                place = pieces[piece, 1] - ends[piece] + position
                number = int(np.searchsorted(store.ends, place, side="right"))
                begin = store.ends[number - 1] if number else 0
                return f"{store.name_of(number)}, token {max(place - begin - 1, 0):,}"
            position -= int(ends[-1]) if len(ends) else 0
        return None


def read_corpus(config: CorpusConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Read and split a text. Token files are memory-mapped, all else is read into memory; what is streamed is left out.

    Args:
        config: the text.
        tokenizer: the configured one when None.

    Raises:
        SeqmixError: a source is missing, unreadable, empty, or shorter than a sequence.
    """
    tokenizer = tokenizer or config.tokenizer_of()
    length = config.sequence_length
    identity = hashlib.sha256(tokenizer.identity.encode())
    parts: dict[str, list[_Part]] = {"training": [], "validation": []}
    splits = list[str]()
    sizes = list[int]()
    for source in config.parts:
        if source.streamed:
            identity.update(source.model_dump_json().encode())
            sizes.append(0)
            continue
        stores = _stores(source, tokenizer)
        split = OWN if config.validation is not None else _split_of(config.split, source, stores)
        pieces = [_split(store, split, config.validation_fraction) for store in stores]
        for store, tables in zip(stores, pieces, strict=True):
            for table in (store.digests, *tables):
                identity.update(table.tobytes())
        for number, part in enumerate(parts.values()):
            part.extend((store, tables[number]) for store, tables in zip(stores, pieces, strict=True))
        sizes.append(_length(parts["training"]) - sum(sizes))
        splits.append(split)
        _require(sizes[-1], length, f"training split of {source_name(source)}", split)
    if config.validation is not None:
        parts["validation"] = [(store, _whole(store)) for store in _stores(config.validation, tokenizer)]
        splits = [OWN]
        for store, _ in parts["validation"]:
            identity.update(store.digests.tobytes())
    if len(sizes) > 1:
        identity.update(repr(config.weights).encode())
    split = ", ".join(dict.fromkeys(splits))
    name = source_name(config)
    _require(_length(parts["validation"]), length, f"validation split of {name}", split)
    stores = list(dict.fromkeys(store for part in parts.values() for store, _ in part))
    count = sum(len(store.ends) for store in stores)
    text_tokens = sum(int(store.ends[-1]) for store in stores) - count
    corpus = Corpus(
        name=name,
        documents=count,
        split=split,
        train=_tokens(parts["training"], tokenizer),
        validation=_tokens(parts["validation"], tokenizer),
        tokenizer=tokenizer,
        bytes_per_token=sum(store.bytes for store in stores) / max(text_tokens, 1),
        digest=identity.hexdigest(),
        parts=tuple(sizes),
        stores=parts,
    )
    for what, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        _require_text(tokens, tokenizer.begin, f"{what} split of {name}")
    for store in stores:
        if isinstance(store, _InMemory) and not isinstance(corpus.train, Stream):
            store.release()
    return corpus


def _tokens(parts: Sequence[_Part], tokenizer: Tokenizer) -> Tokens:
    """Pieces end to end: in memory, unless some are mapped."""
    if not parts:
        return np.array([], dtype=tokenizer.dtype)
    stream = Stream(parts, tokenizer.begin)
    mapped = any(isinstance(store, TokenFile) for store, _ in parts)
    return stream if mapped else stream[:].astype(tokenizer.dtype, copy=False)


def _length(parts: Sequence[_Part]) -> int:
    return sum(int(np.diff(pieces).sum()) for _, pieces in parts)


def _require(tokens: int, length: int, what: str, split: str) -> None:
    if tokens <= length:
        hint = (
            f", or change the split (data.split is {split}: by_document holds out whole documents, by_file whole "
            "files, tail the end of each document)"
        )
        raise SeqmixError(
            f"the {what} has {tokens} tokens, and a sequence with its last target needs {length + 1}: lower "
            f"data.sequence_length, give more text{'' if split == OWN else hint}"
        )


def _require_text(tokens: Tokens, begin: int, what: str) -> None:
    """Refuse a stream in which nothing can be predicted; it is read up to its first token of text."""
    for start in range(0, len(tokens), READ):
        if (tokens[start : start + READ] != begin).any():
            return
    if len(tokens):
        raise SeqmixError(
            f"the {what} has no text: expected at least one token besides the begin token {begin}, got {len(tokens):,} "
            "of it alone; give a text with documents that are not empty"
        )


def _stores(source: DocumentsConfig, tokenizer: Tokenizer) -> Sequence[Store]:
    """The documents of one source: token files, or all in memory."""
    files = list(source_files(source))
    mapped = any(path.suffix == TOKENS for _, path in files)
    return _mapped(files, tokenizer) if mapped else [_InMemory(source, tokenizer)]


def _split_of(split: str, source: DocumentsConfig, stores: Sequence[Store]) -> str:
    """The split that `auto` stands for."""
    if split != "auto":
        return split
    if sum(len(store.ends) for store in stores) == 1:
        return "tail"
    # by_file is by_document where every file is one document
    rows = source.dataset is not None or any(has_rows(path, source.text_field) for _, path in source_files(source))
    return "by_document" if rows or any(isinstance(store, TokenFile) for store in stores) else "by_file"


class _InMemory:
    """Documents in memory."""

    def __init__(self, config: DocumentsConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        documents = list(tokenized(read_documents(config), tokenizer))
        if not documents:
            raise SeqmixError(f"the corpus is empty: no text in {source_name(config)} (glob {config.glob})")
        begin = np.array([tokenizer.begin], dtype=tokenizer.dtype)
        self._tokens = np.concatenate([part for document in documents for part in (begin, document.tokens)])
        self.ends = np.cumsum([len(document.tokens) + 1 for document in documents], dtype=np.int64)
        self.digests = np.array([document.digest for document in documents], dtype=np.uint64)
        self.names = np.array([digest(fsencode(document.file)) for document in documents], dtype=np.uint64)
        self.bytes = sum(document.size for document in documents)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._tokens[start:stop].copy()

    def name_of(self, number: int) -> str:
        with suppress(SeqmixError, StopIteration):  # what has changed since cannot be looked at
            document = next(islice(read_documents(self._config), number, None))
            if digest(document.text) == self.digests[number]:
                return document.name
        return source_name(self._config)

    def release(self) -> None:
        """Keep the tables alone."""
        self._tokens = self._tokens[:0].copy()


def _mapped(files: Sequence[tuple[str, Path]], tokenizer: Tokenizer) -> list[TokenFile]:
    """The token files, which cannot be mixed with text."""
    if texts := [path for _, path in files if path.suffix != TOKENS]:
        other = next(path for _, path in files if path.suffix == TOKENS)
        raise SeqmixError(
            f"token files and text cannot be mixed: {other} is a token file, and {texts[0]} is not; "
            "tokenize the text too, or select files with data.glob"
        )
    return [TokenFile(path, tokenizer, name) for name, path in files]


def _split(store: Store, split: str, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The pieces of a store for training, and for validation (a share `fraction`, or nothing); each [N 2]."""
    pieces = _whole(store)
    if split == OWN:
        return pieces, pieces[:0]
    if split == "tail":
        starts, ends = pieces.T
        # a document of n tokens follows a begin token; another begin token replaces the token before the cut
        cuts = starts + ((ends - starts - 1) * (1 - fraction)).astype(np.int64)
        return np.stack((starts, cuts + 1), axis=1), np.stack((cuts, ends), axis=1)
    shares = (store.digests if split == "by_document" else store.names) / 2.0**64
    validation = shares < fraction
    return pieces[~validation], pieces[validation]


def _whole(store: Store) -> np.ndarray:
    """The start and end of each document, [N 2]."""
    return np.stack((np.concatenate(([0], store.ends[:-1])), store.ends), axis=1)
