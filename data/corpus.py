"""A text corpus as two token streams: the training split and the validation split."""

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
from ..registry import DataError, SeqmixError
from .corpus_config import CorpusConfig, DocumentsConfig
from .files import TOKENS, read_documents, source_files, source_name
from .formats import has_rows
from .order import quotas_of
from .sequences import Tokens
from .token_file import TokenFile
from .token_store import Store, Stream, digest, tokenized

_Part: TypeAlias = tuple[Store, np.ndarray]
"""A store of tokens, and the pieces of it that a split uses: start and end positions, [N 2]."""
SEPARATE = "data.validation"
"""Name of the split when `data.validation` configures separate validation documents."""
ENTROPY_TOKENS = 2**24
"""Maximum number of validation tokens that `unigram_entropy` counts."""
SEARCH_BLOCK = 2**16
"""Tokens read at a time while searching for the first token of text."""


@dataclass(frozen=True)
class Corpus:
    """A text corpus with its training and validation split."""

    name: str
    """Name in messages: the configured paths or dataset."""
    documents: int
    """Number of documents in both splits together."""
    split: str
    """Kind of split: `by_document`, `by_file`, `tail` or `data.validation`; several kinds are joined by commas."""
    train: Tokens
    """Training tokens of all sources that are not streamed, concatenated."""
    validation: Tokens
    """Validation tokens."""
    tokenizer: Tokenizer = field(default_factory=ByteTokenizer)
    bytes_per_token: float = 1.0
    """Mean bytes per token over the whole text, not counting begin tokens; 1 with the byte tokenizer."""
    digest: str | None = None
    """Hash of the documents, the tokenizer and the split."""
    parts: tuple[int, ...] | None = None
    """Number of training tokens of each source, 0 for a streamed source; None if there is only one source."""
    stores: Mapping[str, Sequence[_Part]] = field(default_factory=dict)
    """Stores and pieces that the splits are made of, under the keys `training` and `validation`."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of training tokens of each source, in the order of `train`; 0 for a streamed source."""
        return (len(self.train),) if self.parts is None else self.parts

    @property
    def unigram_entropy(self) -> float:
        """Entropy of the validation split's token frequencies in nats per token (first `ENTROPY_TOKENS` tokens)."""
        counts = np.bincount(self.validation[:ENTROPY_TOKENS], minlength=self.tokenizer.begin + 1)
        counts[self.tokenizer.begin] = 0  # begin tokens are never targets
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def origin(self, position: int, split: str = "training") -> str | None:
        """Name the document that holds a token of a split, and the token's number in it; None if unknown.

        Text files are read again to find the document's name.

        Args:
            position: position of the token in the split.
            split: `training` or `validation`.
        """
        for store, pieces in self.stores.get(split, ()):
            ends = np.diff(pieces).ravel().cumsum()
            if len(ends) and position < ends[-1]:
                piece = np.searchsorted(ends, position, side="right")
                store_position = pieces[piece, 1] - ends[piece] + position
                number = int(np.searchsorted(store.ends, store_position, side="right"))
                begin = store.ends[number - 1] if number else 0
                return f"{store.name_of(number)}, token {max(store_position - begin - 1, 0):,}"
            position -= int(ends[-1]) if len(ends) else 0
        return None


def read_corpus(config: CorpusConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Read a text and split it into training and validation tokens.

    Token files are memory-mapped; other files and datasets are read into memory. Streamed datasets are skipped, because
    training reads them itself.

    Args:
        config: the configuration of the text.
        tokenizer: the tokenizer; None uses the configured one.

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
        split = SEPARATE if config.validation is not None else _resolve_split(config.split, source, stores)
        pieces = [_split_store(store, split, config.test_fraction, config.validation_fraction) for store in stores]
        for store, tables in zip(stores, pieces, strict=True):
            for table in (store.digests, *tables):
                identity.update(table.tobytes())
        for number, part in enumerate(parts.values()):
            part.extend((store, tables[number]) for store, tables in zip(stores, pieces, strict=True))
        sizes.append(_count_tokens(parts["training"]) - sum(sizes))
        splits.append(split)
        _require_length(sizes[-1], length, f"training split of {source_name(source)}", split)
    if config.validation is not None:
        parts["validation"] = [(store, _document_bounds(store)) for store in _stores(config.validation, tokenizer)]
        splits = [SEPARATE]
        for store, _ in parts["validation"]:
            identity.update(store.digests.tobytes())
    if len(sizes) > 1:
        identity.update(repr(config.weights).encode())
        if (quotas_of(config.weights) % 1).any():  # earlier versions read another order: their runs get a note
            identity.update(b"fractional quotas")
    split = ", ".join(dict.fromkeys(splits))
    name = source_name(config)
    _require_length(_count_tokens(parts["validation"]), length, f"validation split of {name}", split)
    stores = list(dict.fromkeys(store for part in parts.values() for store, _ in part))
    count = sum(len(store.ends) for store in stores)
    text_tokens = sum(int(store.ends[-1]) for store in stores) - count
    corpus = Corpus(
        name=name,
        documents=count,
        split=split,
        train=_concatenate(parts["training"], tokenizer),
        validation=_concatenate(parts["validation"], tokenizer),
        tokenizer=tokenizer,
        bytes_per_token=sum(store.bytes for store in stores) / max(text_tokens, 1),
        digest=identity.hexdigest(),
        parts=tuple(sizes),
        stores=parts,
    )
    for split_name, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        _require_text(tokens, tokenizer.begin, f"{split_name} split of {name}")
    for store in stores:
        if isinstance(store, _InMemory) and not isinstance(corpus.train, Stream):
            store.release()
    return corpus


def _concatenate(parts: Sequence[_Part], tokenizer: Tokenizer) -> Tokens:
    """Concatenate pieces: as an array in memory, or as a `Stream` if any store is memory-mapped."""
    if not parts:
        return np.array([], dtype=tokenizer.dtype)
    stream = Stream(parts, tokenizer.begin)
    is_mapped = any(isinstance(store, TokenFile) for store, _ in parts)
    return stream if is_mapped else stream[:].astype(tokenizer.dtype, copy=False)


def _count_tokens(parts: Sequence[_Part]) -> int:
    return sum(int(np.diff(pieces).sum()) for _, pieces in parts)


def _require_length(tokens: int, length: int, name: str, split: str) -> None:
    """Check that a split holds at least one sequence and its last target."""
    if tokens <= length:
        hint = (
            f", add more text, or change the split (data.split is {split}: by_document holds out whole documents, "
            "by_file whole files, tail the end of each document)"
        )
        raise SeqmixError(
            f"the {name} needs at least {length + 1} tokens (data.sequence_length and one target), got {tokens}: lower "
            f"data.sequence_length{' or add more text' if split == SEPARATE else hint}"
        )


def _require_text(tokens: Tokens, begin: int, name: str) -> None:
    """Check that a split has a token of text, not only begin tokens; nothing after the first such token is read."""
    for start in range(0, len(tokens), SEARCH_BLOCK):
        if (tokens[start : start + SEARCH_BLOCK] != begin).any():
            return
    if len(tokens):
        raise SeqmixError(
            f"the {name} has no text: all its tokens ({len(tokens):,}) are the begin token {begin}; use a text with "
            "documents that are not empty"
        )


def _stores(source: DocumentsConfig, tokenizer: Tokenizer) -> Sequence[Store]:
    """Return the stores of one source: one per token file, or one in memory for all documents."""
    files = list(source_files(source))
    has_token_files = any(path.suffix == TOKENS for _, path in files)
    return _open_token_files(files, tokenizer) if has_token_files else [_InMemory(source, tokenizer)]


def _resolve_split(split: str, source: DocumentsConfig, stores: Sequence[Store]) -> str:
    """Resolve `auto` to `tail`, `by_document` or `by_file`."""
    if split != "auto":
        return split
    if sum(len(store.ends) for store in stores) == 1:
        return "tail"
    # by_file only suits sources in which every file is one document
    by_row = source.dataset is not None or any(has_rows(path, source.text_field) for _, path in source_files(source))
    return "by_document" if by_row or any(isinstance(store, TokenFile) for store in stores) else "by_file"


class _InMemory:
    """A store whose documents are all in memory.

    Raises:
        SeqmixError: the source has no text.
    """

    def __init__(self, config: DocumentsConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        documents = list(tokenized(read_documents(config), tokenizer))
        if not documents:
            raise DataError(
                f"the corpus is empty: no text in {source_name(config)} (glob {config.glob}); check the path and "
                "data.glob"
            )
        begin = np.array([tokenizer.begin], dtype=tokenizer.dtype)
        self._tokens = np.concatenate([part for document in documents for part in (begin, document.tokens)])
        self.ends = np.cumsum([len(document.tokens) + 1 for document in documents], dtype=np.int64)
        self.digests = np.array([document.digest for document in documents], dtype=np.uint64)
        self.names = np.array([digest(fsencode(document.file)) for document in documents], dtype=np.uint64)
        self.bytes = sum(document.size for document in documents)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._tokens[start:stop].copy()

    def name_of(self, number: int) -> str:
        # the files may have changed since they were read: then only the name of the source is certain
        with suppress(SeqmixError, StopIteration):
            document = next(islice(read_documents(self._config), number, None))
            if digest(document.text) == self.digests[number]:
                return document.name
        return source_name(self._config)

    def release(self) -> None:
        """Free the tokens and keep the tables, which `Corpus.origin` needs."""
        self._tokens = self._tokens[:0].copy()


def _open_token_files(files: Sequence[tuple[str, Path]], tokenizer: Tokenizer) -> list[TokenFile]:
    """Open token files, and raise a SeqmixError if there are text files among them."""
    if texts := [path for _, path in files if path.suffix != TOKENS]:
        token_file = next(path for _, path in files if path.suffix == TOKENS)
        raise SeqmixError(
            f"token files and text cannot be mixed: {token_file} is a token file, and {texts[0]} is not; "
            "tokenize the text too, or select files with data.glob"
        )
    return [TokenFile(path, tokenizer, name) for name, path in files]


def _split_store(
    store: Store, split: str, test_fraction: float, validation_fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return a store's pieces for training and for validation, each as starts and ends [N 2].

    The fractions are the shares of the test split, which is in neither, and of the validation split; with
    `data.validation` all pieces are for training.
    """
    pieces = _document_bounds(store)
    if split == SEPARATE:
        return pieces, pieces[:0]
    held_out = test_fraction + validation_fraction
    if split == "tail":
        starts, ends = pieces.T
        lengths = ends - starts - 1  # a document is a begin token and n tokens
        cuts = starts + (lengths * (1 - held_out)).astype(np.int64)
        stops = starts + (lengths * (1 - test_fraction)).astype(np.int64)
        # the validation piece starts one token early, because its first token reads as the begin token
        return np.stack((starts, cuts + 1), axis=1), np.stack((cuts, stops + 1), axis=1)
    places = (store.digests if split == "by_document" else store.names) / 2.0**64
    return pieces[places >= held_out], pieces[(test_fraction <= places) & (places < held_out)]


def _document_bounds(store: Store) -> np.ndarray:
    """Return the start and end of each document, [N 2]."""
    return np.stack((np.concatenate(([0], store.ends[:-1])), store.ends), axis=1)
