"""Subwords: vocabularies of Hugging Face `tokenizers`, read from a tokenizer.json or trained; tokenizers by name."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..registry import SeqmixError, nearest, read_bytes, write_file
from .tokenizer import TOKENIZER_FILE, ByteTokenizer, TextDecoder, Tokenizer
from .vocabulary_schema import LARGEST, require_safe

AT_ONCE = 256
"""Documents per batch, which is encoded on all cores."""
EXPORTED_TOKENIZER = "seqmix.tokenizer"
"""The metadata key of a vocabulary in a file of `seqmix export`."""
LEAST_VOCABULARY = 257
"""Every byte, so that any text has tokens, and the begin token."""


class SubwordTokenizer(Tokenizer):
    """The tokens of a vocabulary, and the begin token, which opens every document: one of them, or one that follows.

    Special tokens that the vocabulary's own template would add (`[CLS]`, `</s>`) are not added.

    Raises:
        SeqmixError: it is not a tokenizer, or the library is not installed.
    """

    unit = "subwords"

    def __init__(self, vocabulary: bytes, name: object, begin: str | None = None) -> None:
        """Read the content of a tokenizer.json, which errors call `name`; `begin` is its token that opens a document,
        None for one that follows the last."""
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
        if self.vocab_size > LARGEST:
            raise SeqmixError(
                f"the tokenizer {name} has the token id {self.vocab_size - 1:,}: {LARGEST:,} is too large"
            )
        self._name = name
        if begin is None:
            self.begin = self.vocab_size
            self.vocab_size = self.vocab_size + 1
        elif begin in tokens:
            self.begin = tokens[begin]
            self.identity = f"{self.identity} {begin}"
        else:
            raise SeqmixError(
                f"the tokenizer {name} has no token {begin!r} to open documents with{nearest(begin, tokens)}"
            )

    def encode_documents(self, documents: Iterable[tuple[str, bytes]]) -> Iterator[np.ndarray]:
        """The tokens of UTF-8 text.

        Raises:
            SeqmixError: a document is not UTF-8, or the vocabulary cannot encode it.
        """
        texts = (_decoded(name, text) for name, text in documents)
        while batch := list(islice(texts, AT_ONCE)):
            with _explained(f"the tokenizer {self._name} cannot encode the text"):
                encodings = self._map.encode_batch_fast(batch, add_special_tokens=False)
            for encoding in encodings:
                yield np.array(encoding.ids, dtype=self.dtype)

    def decoder(self) -> TextDecoder:
        """A decoder that shows special tokens too."""
        stream = _library().decoders.DecodeStream(skip_special_tokens=False)
        held = []

        def decode(token: int | None) -> str:
            with _explained(f"the tokenizer {self._name} cannot decode what was generated"):
                return decoded(token)

        def decoded(token: int | None) -> str:
            if token is None:  # the bytes of an incomplete character
                return self._map.decode(held, skip_special_tokens=False) if held else ""
            if (piece := stream.step(self._map, token)) is None:
                held.append(token)
                return ""
            held.clear()
            return piece

        return decode


def load_tokenizer(name: str | Path, begin: str | None = None) -> Tokenizer:
    """The tokenizer that a name stands for: `bytes`, or a tokenizer.json of Hugging Face, with its begin token.

    Args:
        name: `bytes`, the file, a folder that holds a tokenizer.json, or a file of `seqmix export`.
        begin: the token of the vocabulary that opens a document; None for one that follows the last.

    Raises:
        SeqmixError: the file is missing or not a tokenizer, or the library that reads it is not installed.
    """
    if name == ByteTokenizer.identity:
        return ByteTokenizer()
    file = Path(name).expanduser()
    _library()  # a missing library is reported before a missing file
    if file.is_dir():
        folder = file
        file = file / TOKENIZER_FILE
        if not file.is_file():
            raise SeqmixError(
                f"the tokenizer {folder} is a folder without {TOKENIZER_FILE}; transformers writes one from other "
                f"files: AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...)"
            )
    try:
        vocabulary = _exported(file) if file.suffix == ".safetensors" else read_bytes(file)
        return SubwordTokenizer(vocabulary, file, begin)
    except OSError as error:
        hint = "; data.tokenizer is `bytes` or a tokenizer.json" if isinstance(error, FileNotFoundError) else ""
        raise SeqmixError(f"the tokenizer {file} cannot be read: {error.strerror}{hint}") from error


def train_bpe(
    documents: Iterable[tuple[str, bytes]], vocab_size: int, file: Path, *, write: bool = True
) -> SubwordTokenizer:
    """Train a vocabulary of byte pairs (BPE) on documents, and write it.

    Args:
        documents: names and texts.
        vocab_size: tokens in all: 256 bytes, pairs, and the begin token. A small text has fewer pairs.
        file: the tokenizer.json.
        write: whether it is written; its content is the tokenizer's `vocabulary`.

    Raises:
        SeqmixError: the vocabulary is too small for all bytes, a document is not UTF-8, the file cannot be written, or
            the library is not installed.
    """
    library = _library()
    byte_level = library.pre_tokenizers.ByteLevel
    if vocab_size < LEAST_VOCABULARY:
        raise SeqmixError(
            f"a vocabulary of byte pairs needs at least {LEAST_VOCABULARY} tokens (256 bytes and the begin token), "
            f"and {vocab_size} were asked for"
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


def _exported(file: Path) -> bytes:
    """The vocabulary in the metadata of a file of weights."""
    try:
        with safe_open(file, "pt") as tensors:
            return tensors.metadata()[EXPORTED_TOKENIZER].encode()
    except (SafetensorError, KeyError, TypeError) as error:
        raise SeqmixError(f"the tokenizer {file} is a file of weights without a vocabulary") from error


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever the library raises into a SeqmixError: Exception itself, and a panic, which is not an Exception."""
    try:
        yield
    except SeqmixError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        raise SeqmixError(f"{what}: {reason}") from error


def _decoded(name: str, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise SeqmixError(
            f"{name} is not UTF-8: byte 0x{text[error.start]:02x} at {error.start:,}; the tokenizer `bytes` takes "
            "any bytes"
        ) from error


def _library() -> Any:
    try:
        return import_module("tokenizers")
    except ModuleNotFoundError as error:
        if error.name != "tokenizers":
            raise
        raise SeqmixError("a tokenizer other than `bytes` needs tokenizers: pip install 'seqmix[data]'") from None
