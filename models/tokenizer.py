"""Tokenizers: the base class, and the byte tokenizer, which needs no training and no vocabulary.

Every document starts with the begin token. By default this is an additional token after all others, which no text
encodes to; a token of the vocabulary can be chosen instead.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ..registry import SeqmixError, write_file

TOKENIZER_FILE = "tokenizer.json"
"""Name of the vocabulary's file in a run directory."""


TextDecoder: TypeAlias = Callable[[int | None], str]
"""Function that decodes one text token by token. Each call takes the next token and returns the new characters; None
ends the text and returns the rest. Tokens may be parts of a character, which is returned when it is complete."""


class Tokenizer(ABC):
    """A mapping from text to tokens and back."""

    unit: str
    """Plural noun for tokens in messages: "bytes" or "subwords"."""
    identity: str
    """Identifier that is equal for equal tokenizers: `bytes`, or a hash of the vocabulary."""
    vocab_size: int
    """Number of tokens, including the begin token."""
    begin: int
    """ID of the begin token, which opens every document."""
    vocabulary: bytes | None = None
    """Content of the tokenizer.json; None for the byte tokenizer, which has no file."""

    @property
    def text_tokens(self) -> int:
        """Number of tokens that may be generated, the IDs below it: all except a begin token that comes last."""
        return self.vocab_size - (self.begin == self.vocab_size - 1)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """NumPy dtype of tokens in files: uint16 if it can represent every token, otherwise uint32."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    @abstractmethod
    def encode_documents(self, documents: Iterable[tuple[str, bytes]]) -> Iterator[np.ndarray]:
        """Yield the tokens of each document, without a begin token; documents are pairs of a name and UTF-8 text.

        Raises:
            SeqmixError: a document cannot be encoded; the message has its name.
        """

    @abstractmethod
    def decoder(self) -> TextDecoder:
        """Return a new decoder for one text."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer.json, which `load_tokenizer` reads, into a folder; the byte tokenizer writes no file.

        Raises:
            SeqmixError: the file cannot be written.
        """
        if self.vocabulary is not None:
            write_file(self.vocabulary, folder / TOKENIZER_FILE)

    def encode(self, text: str) -> Int[Tensor, " T"]:
        """Return the begin token and the tokens of a text.

        Raises:
            SeqmixError: the text contains half of a surrogate pair, which is not a character.
        """
        try:
            # Python passes the bytes of a command line that are not UTF-8 as surrogates
            text_bytes = text.encode(errors="surrogateescape")
        except UnicodeEncodeError as error:
            character = text[error.start]
            raise SeqmixError(f"the text contains {character!r} at {error.start}, which is not a character") from error
        (tokens,) = self.encode_documents([("the text", text_bytes)])
        return torch.tensor([self.begin, *tokens.tolist()], dtype=torch.int64)


class ByteTokenizer(Tokenizer):
    """Tokenizer of UTF-8 bytes: tokens 0 to 255 are bytes, and token 256 opens every document."""

    unit = "bytes"
    identity = "bytes"
    vocab_size = 257
    begin = 256

    def encode_documents(self, documents: Iterable[tuple[str, bytes]]) -> Iterator[np.ndarray]:
        """Yield the bytes of each document."""
        for _, text in documents:
            yield np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def decoder(self) -> TextDecoder:
        """Return a decoder of UTF-8; invalid bytes become U+FFFD."""
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        return lambda token: decode(b"" if token is None else bytes([token]), final=token is None)
