"""Tokenizers: the base class, and the byte tokenizer, which needs no training and no vocabulary.

The begin token opens a document: the last token, to which no text encodes, unless a vocabulary's own is chosen.
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
"""The name of a vocabulary in a run directory."""


TextDecoder: TypeAlias = Callable[[int | None], str]
"""Decodes one text as its tokens arrive: returns the text that is certain after one more token, and with None, which
ends it, the incomplete rest. A token may hold a part of the bytes of a character."""


class Tokenizer(ABC):
    """A map of text to tokens and back."""

    unit: str
    """What a token is, in the plural."""
    identity: str
    """Equal for equal maps: `bytes`, or a hash of the vocabulary's file."""
    vocab_size: int
    """Number of tokens, the begin token among them."""
    begin: int
    """The token that opens a document."""
    vocabulary: bytes | None = None
    """The content of its tokenizer.json; None for bytes."""

    @property
    def text_tokens(self) -> int:
        """Tokens below this one are generated: all but a begin token that follows those of a vocabulary."""
        return self.vocab_size - (self.begin == self.vocab_size - 1)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest of uint16 and uint32 that holds every token."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    @abstractmethod
    def encode_documents(self, documents: Iterable[tuple[str, bytes]]) -> Iterator[np.ndarray]:
        """The tokens of documents, given by name and text, without begin tokens.

        Raises:
            SeqmixError: a document has no tokens here, by its name.
        """

    @abstractmethod
    def decoder(self) -> TextDecoder:
        """A new decoder, for one text."""

    def save(self, folder: Path) -> None:
        """Write its tokenizer.json, from which `load_tokenizer` makes it again, into a folder; nothing for bytes.

        Raises:
            SeqmixError: it cannot be written.
        """
        if self.vocabulary is not None:
            write_file(self.vocabulary, folder / TOKENIZER_FILE)

    def encode(self, text: str) -> Int[Tensor, " T"]:
        """The tokens of a text, opened by the begin token.

        Raises:
            SeqmixError: the text holds half of a surrogate pair, which is not a character.
        """
        try:
            # bytes of a command line that are not UTF-8 arrive as surrogates
            text_bytes = text.encode(errors="surrogateescape")
        except UnicodeEncodeError as error:
            raise SeqmixError(f"the text has no character at {error.start}: {text[error.start]!r}") from error
        (tokens,) = self.encode_documents([("the text", text_bytes)])
        return torch.tensor([self.begin, *tokens.tolist()], dtype=torch.int64)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as tokens 0 to 255; token 256 opens every document."""

    unit = "bytes"
    identity = "bytes"
    vocab_size = 257
    begin = 256

    def encode_documents(self, documents: Iterable[tuple[str, bytes]]) -> Iterator[np.ndarray]:
        """The bytes."""
        for _, text in documents:
            yield np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def decoder(self) -> TextDecoder:
        """A decoder of UTF-8; invalid bytes become U+FFFD."""
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        return lambda token: decode(b"" if token is None else bytes([token]), final=token is None)
