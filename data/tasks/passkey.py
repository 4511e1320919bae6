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
    """Passkey retrieval (arXiv 2305.16300): a sentence with a number is hidden in a text; a question at the end of the
    text asks for the number, whose digits are the targets.

    Tokens are bytes and the begin token. Training uses the training split of the text, evaluation the validation split.
    """

    field = "depths"
    axis = "depth"
    kind: Literal["passkey"] = "passkey"
    sequence_length: int = Field(default=512, gt=0, le=2**20)
    """Training sequence length in tokens."""
    depths: Difficulties = (0, 25, 50, 75, 100)
    """Percentages of the text that come before the number; rows cycle through them."""
    digits: int = Field(default=5, gt=0, le=100)
    """Number of digits of the hidden number."""
    paths: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(default=None, min_length=1)
    """Files and folders of the text; null reads the source of Python's standard library."""

    @property
    def n_tokens(self) -> int:
        return ByteTokenizer.vocab_size

    def length_of(self, difficulty: int) -> int:
        # the last digit is a target only, which leaves one position for the text
        return len(NEEDLE % bytes(self.digits) + QUESTION) + self.digits

    def require(self, difficulty: int) -> None:
        if difficulty > 100:
            raise ValueError(f"depth must be a percentage from 0 to 100, got {difficulty}")

    def open(self, vocab_size: int, run: Path | None = None) -> Source:
        return Task(self, read_corpus(TextConfig(paths=self.paths, sequence_length=self.sequence_length)))

    def tokenizer_of(self, run: Path | None = None) -> Tokenizer:
        return ByteTokenizer()

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        """Hide a number in each text and ask for it at the end; the text's last tokens are dropped to make room."""
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
        match = re.search(NEEDLE.replace(b".", rb"\.") % rb"(\d+)", text)
        answer_start = text.rindex(QUESTION) + len(QUESTION) - 1
        return {} if match is None else {answer_start + i: digit for i, digit in enumerate(match[1])}

    def name_of(self, token: int) -> str:
        return "▪" if token == ByteTokenizer.begin else chr(token) if 32 < token < 127 else "␣"
