"""Passkey retrieval: recall a number hidden in a text (Mohtashami and Jaggi 2023, arXiv 2305.16300)."""

import re
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from ...models import ByteTokenizer, Tokenizer
from ..corpus import read_corpus
from ..source import Source
from ..task import Difficulties, Task, TaskConfig
from .text import TextConfig

NEEDLE = b"\nThe pass key is %s. Remember it.\n"
QUESTION = b"\nWhat is the pass key? The pass key is "


class PasskeyConfig(TaskConfig):
    """Passkey retrieval: a number in its own sentence, hidden in a text, is the target at the end, digit by digit
    (arXiv 2305.16300).

    Tokens are bytes and the begin token. Training uses the training split of the text, evaluation the validation split.
    """

    field = "depths"
    axis = "depth"
    kind: Literal["passkey"] = "passkey"
    sequence_length: int = Field(default=512, gt=0, le=2**20)
    """Training sequence length in tokens."""
    depths: Difficulties = (0, 25, 50, 75, 100)
    """Percent of the text before the number, which rows cycle through."""
    digits: int = Field(default=5, gt=0, le=100)
    """Digits of the number."""
    paths: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(default=None, min_length=1)
    """Files and folders of the text; null reads the source of Python's own standard library."""

    @property
    def n_tokens(self) -> int:
        return ByteTokenizer.vocab_size

    def length_of(self, difficulty: int) -> int:
        # the last digit is a target only: its position is a byte of text
        return len(NEEDLE % bytes(self.digits) + QUESTION) + self.digits

    def require(self, difficulty: int) -> None:
        if difficulty > 100:
            raise ValueError(f"depth is a percentage, from 0 to 100, and is {difficulty}")

    def open(self, vocab_size: int, run: Path | None = None) -> Source:
        return Task(self, read_corpus(TextConfig(paths=self.paths, sequence_length=self.sequence_length)))

    def tokenizer_of(self, run: Path | None = None) -> Tokenizer:
        return ByteTokenizer()

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        """Hide numbers in the text, which loses its last tokens, and ask for them at the end."""
        numbers = rng.integers(ord("0"), ord("9") + 1, size=(len(inputs), self.digits))
        needle = list(NEEDLE % bytes(self.digits))
        end = inputs.shape[1] - len(QUESTION) - self.digits + 1
        place = round((end - len(needle)) * difficulty / 100)
        number = place + NEEDLE.index(b"%s")
        inputs[:, place + len(needle) : end] = inputs[:, place : end - len(needle)]
        inputs[:, place : place + len(needle)] = needle
        inputs[:, number : number + self.digits] = numbers
        inputs[:, end : end + len(QUESTION)] = list(QUESTION)
        inputs[:, end + len(QUESTION) :] = numbers[:, :-1]
        targets[:, -self.digits :] = numbers

    def solve(self, tokens: list[int]) -> dict[int, int]:
        text = bytes(min(token, 255) for token in tokens)
        found = re.search(NEEDLE.replace(b".", rb"\.") % rb"(\d+)", text)
        asked = text.rindex(QUESTION) + len(QUESTION) - 1
        return {} if found is None else {asked + i: digit for i, digit in enumerate(found[1])}

    def name_of(self, token: int) -> str:
        return "▪" if token == ByteTokenizer.begin else chr(token) if 32 < token < 127 else "␣"
