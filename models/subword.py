"""Subword tokenizers of the Hugging Face library `tokenizers`: load one by name, or train one."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..registry import DataError, SeqmixError, nearest_hint, read_bytes, write_file
from .tokenizer import TOKENIZER_FILE, ByteTokenizer, TextDecoder, Tokenizer
from .vocabulary_schema import MAX_TOKEN_IDS, require_safe

BATCH_DOCUMENTS = 256
"""Number of documents in a batch, which the library `tokenizers` encodes on all cores."""
EXPORTED_TOKENIZER = "seqmix.tokenizer"
"""Key of the vocabulary in the metadata of a file that `seqmix export` wrote."""
MIN_VOCABULARY = 257
"""Smallest vocabulary: every byte, so that any text can be encoded, and the begin token."""


class SubwordTokenizer(Tokenizer):
    """A subword tokenizer: the tokens of a vocabulary, and the begin token, which opens every document.

    The begin token is a token of the vocabulary, or an additional one. Special tokens that the vocabulary's own
    template would add (`[CLS]`, `</s>`) are not added.

    Raises:
        SeqmixError: the vocabulary is not a valid tokenizer.json, or the library is not installed.
    """

    unit = "subwords"

    def __init__(self, vocabulary: bytes, name: object, begin: str | None = None) -> None:
        """Create a tokenizer.

        Args:
            vocabulary: the content of a tokenizer.json.
            name: the name of the file in errors.
            begin: the token of the vocabulary that opens a document; None to add one after the last token.
        """
        library = _library()
        require_safe(vocabulary, name)
        with _explained(f"the tokenizer {name} is not a tokenizer.json"):
            self._map = library.Tokenizer.from_buffer(vocabulary)
        self._map.no_truncation()
        self._map.no_padding()
        self.vocabulary = vocabulary
        self.identity = f"sha256:{hashlib.sha256(vocabulary).hexdigest()}"
        tokens = self._map.get_vocab(with_added_tokens=True)
        self.vocab_size = max(tokens.values(), default=-1) + 1  # ids may have holes
        if self.vocab_size > MAX_TOKEN_IDS:
            raise DataError(
                f"the tokenizer {name} must have token ids below {MAX_TOKEN_IDS:,}, got {self.vocab_size - 1:,}"
            )
        self._name = name
        if begin is None:
            self.begin = self.vocab_size
            self.vocab_size = self.vocab_size + 1
        elif begin in tokens:
            self.begin = tokens[begin]
            self.identity = f"{self.identity} {begin}"
        else:
            hint = nearest_hint(begin, tokens)
            raise SeqmixError(f"expected a token of the tokenizer {name} to open documents, got {begin!r}{hint}")

    def encode_documents(self, documents: Iterable[tuple[str, bytes]]) -> Iterator[np.ndarray]:
        """Yield the tokens of each document, without a begin token; documents are pairs of a name and UTF-8 text.

        Raises:
            SeqmixError: a document is not UTF-8, or the vocabulary cannot encode it.
        """
        texts = (_decoded(name, text) for name, text in documents)
        while batch := list(islice(texts, BATCH_DOCUMENTS)):
            with _explained(f"the tokenizer {self._name} cannot encode the text"):
                encodings = self._map.encode_batch_fast(batch, add_special_tokens=False)
            for encoding in encodings:
                yield np.array(encoding.ids, dtype=self.dtype)

    def decoder(self) -> TextDecoder:
        """Return a new decoder for one text; special tokens appear in the text."""
        stream = _library().decoders.DecodeStream(skip_special_tokens=False)
        pending = []

        def decode(token: int | None) -> str:
            with _explained(f"the tokenizer {self._name} cannot decode the generated tokens"):
                return decode_unchecked(token)

        def decode_unchecked(token: int | None) -> str:
            if token is None:  # at the end, decode the bytes of an incomplete character
                return self._map.decode(pending, skip_special_tokens=False) if pending else ""
            if (piece := stream.step(self._map, token)) is None:
                pending.append(token)
                return ""
            pending.clear()
            return piece

        return decode


def load_tokenizer(name: str | Path, begin: str | None = None) -> Tokenizer:
    """Load a tokenizer: `bytes`, or a tokenizer.json of Hugging Face.

    Args:
        name: `bytes`, a tokenizer.json, a folder with a tokenizer.json, or a file of `seqmix export`.
        begin: the token of the vocabulary that opens a document; None to add one after the last token.

    Raises:
        SeqmixError: the file is missing or not a tokenizer, or the library that reads it is not installed.
    """
    if name == ByteTokenizer.identity:
        return ByteTokenizer()
    file = Path(name).expanduser()
    _library()  # report a missing library before a missing file
    if file.is_dir():
        folder = file
        file = file / TOKENIZER_FILE
        if not file.is_file():
            raise DataError(
                f"the tokenizer {folder} is a folder without {TOKENIZER_FILE}: write one with transformers, "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...)"
            )
    try:
        vocabulary = _exported(file) if file.suffix == ".safetensors" else read_bytes(file)
        return SubwordTokenizer(vocabulary, file, begin)
    except OSError as error:
        hint = "; expected `bytes` or a tokenizer.json" if isinstance(error, FileNotFoundError) else ""
        raise DataError(f"the tokenizer {file} cannot be read: {error.strerror}{hint}") from error


def train_bpe(
    documents: Iterable[tuple[str, bytes]], vocab_size: int, file: Path, *, write: bool = True
) -> SubwordTokenizer:
    """Train a vocabulary by byte-pair encoding (BPE), write it, and return its tokenizer.

    Args:
        documents: names and texts.
        vocab_size: the maximum number of tokens: 256 bytes, pairs, and the begin token. A short text gives fewer pairs.
        file: the tokenizer.json to write.
        write: False to train without writing; the content is the tokenizer's `vocabulary`.

    Raises:
        SeqmixError: `vocab_size` is too small for all bytes, a document is not UTF-8, the file cannot be written, or
            the library is not installed.
    """
    library = _library()
    byte_level = library.pre_tokenizers.ByteLevel
    if vocab_size < MIN_VOCABULARY:
        raise SeqmixError(
            f"a vocabulary of byte pairs needs at least {MIN_VOCABULARY} tokens (256 bytes and the begin token), got "
            f"{vocab_size}"
        )
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=sorted(byte_level.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator((_decoded(name, text) for name, text in documents), trainer)
    vocabulary = tokenizer.to_str(pretty=True).encode()
    if write:
        write_file(vocabulary, file)
    return SubwordTokenizer(vocabulary, file)


def have_same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Return True if two tokenizers map text to the same tokens; their files may differ."""
    return one.identity == other.identity or _comparable_parts(one) == _comparable_parts(other)


def _comparable_parts(tokenizer: Tokenizer) -> Any:
    """Return the parts of a tokenizer that define its tokens; equal for equivalent tokenizers in different files."""
    if tokenizer.vocabulary is None:
        return tokenizer.identity
    parts = json.loads(_library().Tokenizer.from_buffer(tokenizer.vocabulary).to_str())
    words = parts["model"].get("vocab")
    if isinstance(words, dict):
        parts["model"]["vocab"] = {word: number for word, number in words.items() if number != tokenizer.begin}
    added = [token for token in parts["added_tokens"] if token["id"] != tokenizer.begin]
    return tokenizer.begin, added, *(parts[name] for name in ("model", "normalizer", "pre_tokenizer"))


def _exported(file: Path) -> bytes:
    """Read the vocabulary from the metadata of a file of `seqmix export`."""
    try:
        with safe_open(file, "pt") as tensors:
            return tensors.metadata()[EXPORTED_TOKENIZER].encode()
    except (SafetensorError, KeyError, TypeError) as error:
        raise DataError(f"the tokenizer {file} has no vocabulary: expected a file of `seqmix export`") from error


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Context that turns errors of the library `tokenizers` into DataErrors that begin with `what`.

    The library raises plain `Exception`s, and for a panic in Rust a `PanicException`, which is not an `Exception`.
    """
    try:
        yield
    except SeqmixError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        raise DataError(f"{what}: {reason}") from error


def _decoded(name: str, text: bytes) -> str:
    """Return the text of UTF-8 bytes; a SeqmixError names the document if they are not UTF-8."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8: byte 0x{text[error.start]:02x} at {error.start:,}; use the tokenizer `bytes` for "
            "arbitrary bytes"
        ) from error


def _library() -> Any:
    """Import the library `tokenizers`; a SeqmixError tells how to install it."""
    try:
        return import_module("tokenizers")
    except ModuleNotFoundError as error:
        if error.name != "tokenizers":
            raise
        raise SeqmixError(
            "a tokenizer other than `bytes` needs the package tokenizers: pip install tokenizers"
        ) from None
