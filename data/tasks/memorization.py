"""Memorization of facts (MAD: Poli et al. 2024, Mechanistic Design and Scaling, arXiv 2403.17844)."""

from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, TaskConfig


class MemorizationConfig(TaskConfig):
    """The memorization task of MAD (arXiv 2403.17844): keys, each followed by a query token, at which the target is the
    key's value. A key has the same value in all sequences, and values are never part of the input: the parameters have
    to memorise them.

    Half of the tokens (from 0) are keys, the other half values; the last token is the query.
    """

    field = "facts"
    axis = "facts"
    kind: Literal["memorization"] = "memorization"
    sequence_length: int = Field(default=32, gt=1, le=2**20)
    """Training sequence length in tokens."""
    vocab_size: int = Field(default=256, ge=5, le=2**20)
    """Vocabulary size of the task: keys, values and the query token."""
    facts: Difficulties | None = None
    """Numbers of different keys that a sequence draws from; rows cycle through them. Null for all keys."""
    map_seed: int = Field(default=12345, ge=0)
    """Seed of the map from keys to values."""

    @property
    def n_tokens(self) -> int:
        return self.vocab_size

    @property
    def hardest(self) -> int:
        return (self.vocab_size - 1) // 2

    def length_of(self, difficulty: int) -> int:
        return 2

    def require(self, difficulty: int) -> None:
        super().require(difficulty)
        if difficulty > self.hardest:
            raise ValueError(
                f"facts must be at most {self.hardest}, the number of keys with vocab_size {self.vocab_size}, "
                f"got {difficulty}: raise vocab_size"
            )

    @cached_property
    def values(self) -> np.ndarray:
        """Value token of each key, [number of keys]."""
        values = np.random.default_rng(self.map_seed).permutation(np.arange(self.hardest, self.vocab_size - 1))
        return values[: self.hardest]

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        keys = rng.integers(difficulty, size=(len(inputs), inputs.shape[1] // 2))
        end = 2 * keys.shape[1]
        inputs[:, 0:end:2], inputs[:, 1:end:2] = keys, self.vocab_size - 1
        targets[:, 1:end:2] = self.values[keys]

    def solve(self, tokens: list[int]) -> dict[int, int]:
        places = (place for place, token in enumerate(tokens) if token == self.vocab_size - 1)
        return {place: int(self.values[tokens[place - 1]]) for place in places}

    def name_of(self, token: int) -> str:
        if token == self.vocab_size - 1:
            return "?"
        return f"k{token}" if token < self.hardest else f"v{token - self.hardest}"
