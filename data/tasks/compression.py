"""Compression of a sequence into one vector (MAD: Poli et al. 2024, arXiv 2403.17844)."""

from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, TaskConfig


class CompressionConfig(TaskConfig):
    """The compression task of MAD (arXiv 2403.17844): random tokens and an end token; the target at each position is
    the input token there. The task needs `model.readout: last`, which predicts all targets from the vector at the end
    token.

    The end token is the last token of the vocabulary. Shorter examples are padded with it on the left, without targets.
    """

    field = "lengths"
    axis = "length"
    readout = "last"
    kind: Literal["compression"] = "compression"
    sequence_length: int = Field(default=32, gt=1, le=2**20)
    """Training sequence length in tokens."""
    vocab_size: int = Field(default=16, ge=3, le=2**20)
    """Vocabulary size of the task: the random tokens, all equally likely, and the end token."""
    lengths: Difficulties | None = None
    """Numbers of tokens to compress, including the end token; rows cycle through them. Null for the whole sequence."""

    @property
    def n_tokens(self) -> int:
        return self.vocab_size

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        start = inputs.shape[1] - difficulty
        inputs[:] = self.vocab_size - 1
        inputs[:, start:-1] = rng.integers(self.vocab_size - 1, size=(len(inputs), difficulty - 1))
        targets[:, start:] = inputs[:, start:]

    def solve(self, tokens: list[int]) -> dict[int, int]:
        return dict(enumerate(tokens))

    def name_of(self, token: int) -> str:
        return "end" if token == self.vocab_size - 1 else str(token)
