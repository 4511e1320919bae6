"""In-context recall, plain and noisy (MAD: Poli et al. 2024, Mechanistic Design and Scaling, arXiv 2403.17844)."""

from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, NextTokenConfig, distinct


class InContextRecallConfig(NextTokenConfig):
    """The in-context recall task of MAD (arXiv 2403.17844): pairs of a key and its value fill the sequence; a repeated
    key always has the same value. The targets are the values of keys that occurred before; the last key is always one
    of them.

    Keys are tokens 0 to vocab_size / 2 - 1, values the tokens up to vocab_size - 1, and noise tokens follow. In the
    noisy variant (`noise_tokens` > 0), a pair is replaced by two noise tokens with probability `noise`.
    """

    field = "keys"
    axis = "keys"
    kind: Literal["in_context_recall"] = "in_context_recall"
    sequence_length: int = Field(default=128, gt=3, le=2**20)
    """Training sequence length in tokens."""
    vocab_size: int = Field(default=16, ge=4, le=2**20)
    """Number of keys and values together, half each; noise tokens are additional."""
    keys: Difficulties | None = None
    """Numbers of different keys that a sequence draws from; rows cycle through them. Null for all keys."""
    noise_tokens: int = Field(default=0, ge=0, le=2**20)
    """Number of different noise tokens; 0 for the plain variant."""
    noise: float = Field(default=0.2, ge=0, lt=1)
    """Probability that a pair is noise, if there are noise tokens; at least one pair before the last is real."""

    @property
    def n_tokens(self) -> int:
        return 2 * (self.vocab_size // 2) + self.noise_tokens

    @property
    def hardest(self) -> int:
        return self.vocab_size // 2

    def length_of(self, difficulty: int) -> int:
        return 4

    def require(self, difficulty: int) -> None:
        super().require(difficulty)
        if difficulty > self.hardest:
            raise ValueError(
                f"keys must be at most {self.hardest}, half of vocab_size {self.vocab_size}, got {difficulty}: raise "
                "vocab_size"
            )

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        rows = len(inputs)
        pairs = inputs.shape[1] // 2
        half = self.vocab_size // 2
        used = distinct(rng, rows, half, difficulty)
        keys = np.take_along_axis(used, rng.integers(difficulty, size=(rows, pairs)), axis=1)
        real = np.ones((rows, pairs), dtype=bool)
        if self.noise_tokens:
            real = rng.random((rows, pairs)) >= self.noise
            real[np.arange(rows), rng.integers(pairs - 1, size=rows)] = True
        shown = (keys[..., None] == np.arange(half)) & real[..., None]  # [B pairs keys]
        shown[:, -1] = False
        # the last key is drawn uniformly from the keys that were shown
        keys[:, -1] = np.where(shown.any(1), rng.random((rows, half)), -1).argmax(1)
        real[:, -1] = True
        values = half + np.take_along_axis(rng.integers(half, size=(rows, half)), keys, axis=1)
        shown_before = np.take_along_axis(shown.cumsum(1) - shown, keys[..., None], axis=2)[..., 0] > 0
        filler = 2 * half + rng.integers(max(self.noise_tokens, 1), size=(2, rows, pairs))
        end = 2 * pairs
        inputs[:, 0:end:2], inputs[:, 1:end:2] = np.where(real, np.stack([keys, values]), filler)
        targets[:, 0:end:2] = np.where(real & shown_before, values, targets[:, 0:end:2])

    def solve(self, tokens: list[int]) -> dict[int, int]:
        values: dict[int, int] = {}
        answers = {}
        for place in range(0, len(tokens) - 1, 2):
            key, value = tokens[place : place + 2]
            if key in values:
                answers[place] = values[key]
            elif key < self.vocab_size // 2:
                values[key] = value
        return answers

    def name_of(self, token: int) -> str:
        half = self.vocab_size // 2
        return f"k{token}" if token < half else f"v{token - half}" if token < 2 * half else "~"
