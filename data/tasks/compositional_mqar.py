"""Multi-query associative recall with keys of two tokens (Zoology, after arXiv 2312.04927)."""

from itertools import pairwise
from math import isqrt
from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, TaskConfig, distinct
from .mqar import ask


class CompositionalMqarConfig(TaskConfig):
    """Multi-query associative recall with keys of two tokens (Zoology's compositional MQAR): triples of the key's two
    tokens and the value, in random order, then each key once more, with its value as the target at the second token.

    The keys are all combinations of some first tokens with equally many second tokens, so neither token alone
    determines the value. The positions after the triples are divided into groups of three, in which the keys are
    repeated as in `mqar`.
    """

    field = "pairs"
    axis = "pairs"
    kind: Literal["compositional_mqar"] = "compositional_mqar"
    vocab_size: int = Field(default=96, ge=6, le=2**20)
    """Vocabulary size of the task: one third each for first tokens of keys, second tokens of keys, and values."""
    pairs: Difficulties | None = (4, 9)
    """Numbers of keys, which must be squares; rows cycle through them. Null for the most that fit into a sequence."""
    power_a: float = Field(default=0.01, gt=0, le=1)
    """Exponent of the power law of the question positions, as in `mqar`."""
    noise: bool = True
    """True to fill the other positions after the triples with random tokens, including keys and values; False leaves
    token 0 there."""

    @property
    def n_tokens(self) -> int:
        return self.vocab_size

    @property
    def hardest(self) -> int:
        return min(isqrt(super().hardest), self._max_side) ** 2

    @property
    def _max_side(self) -> int:
        """Square root of the largest number of keys for which the vocabulary has enough tokens."""
        third = self.vocab_size // 3
        return min(third - 1, isqrt(self.vocab_size - 2 * third))

    def length_of(self, difficulty: int) -> int:
        return 6 * difficulty  # three tokens per key, and three positions to repeat it

    def require(self, difficulty: int) -> None:
        super().require(difficulty)
        side = isqrt(difficulty)
        if side**2 != difficulty:
            raise ValueError(f"pairs must be a square, got {difficulty}: choose {side**2} or {(side + 1) ** 2}")
        if side > self._max_side:
            raise ValueError(
                f"vocab_size {self.vocab_size} allows at most {self._max_side**2} pairs, got {difficulty}: raise "
                f"vocab_size to {3 * difficulty + 3}"
            )

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        rows = len(inputs)
        third = self.vocab_size // 3
        start = 3 * difficulty
        side = isqrt(difficulty)
        first = 1 + distinct(rng, rows, third - 1, side)
        second = third + distinct(rng, rows, third, side)
        order = distinct(rng, rows, difficulty, difficulty)
        keys = (np.take_along_axis(first, order // side, 1), np.take_along_axis(second, order % side, 1))
        values = 2 * third + distinct(rng, rows, self.vocab_size - 2 * third, difficulty)
        inputs[:, 0:start:3], inputs[:, 1:start:3], inputs[:, 2:start:3] = *keys, values
        ask(rng, inputs, targets, start, keys, values, self.power_a, self.noise * self.vocab_size)

    def solve(self, tokens: list[int]) -> dict[int, int]:
        seen: dict[tuple[int, int], int] = {}
        answers = {}
        for place, key in enumerate(pairwise(tokens), 1):
            if key in seen:
                answers[place] = seen[key]
            elif place + 1 < len(tokens):
                seen[key] = tokens[place + 1]  # a key is first seen in its triple
        return answers

    def name_of(self, token: int) -> str:
        third = self.vocab_size // 3
        letter = "abv"[min(token // third, 2)]
        return "·" if token == 0 else f"{letter}{token - third * 'abv'.index(letter)}"
