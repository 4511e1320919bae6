"""Text as bytes: 256 tokens, and one that opens a document."""

import codecs

import torch
from jaxtyping import Int
from torch import Tensor

from ..registry import SeqmixError


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255; token 256 opens every document."""

    vocab_size = 257
    begin = 256

    def encode(self, text: str) -> Int[Tensor, " T"]:
        """The tokens of a text, opened by the begin token.

        Raises:
            SeqmixError: the text holds half of a surrogate pair, which is no character.
        """
        try:
            # what a command line could not decode comes back as the bytes it was
            text_bytes = text.encode(errors="surrogateescape")
        except UnicodeEncodeError as error:
            raise SeqmixError(f"the text has no character at {error.start}: {text[error.start]!r}") from error
        return torch.tensor([self.begin, *text_bytes], dtype=torch.int64)

    def decoder(self) -> codecs.IncrementalDecoder:
        """Turns bytes into text as they come; a character's bytes may come apart."""
        return codecs.getincrementaldecoder("utf-8")(errors="replace")
