"""Multi-query associative recall of keys of two tokens (Zoology, after arXiv 2312.04927)."""

from itertools import pairwise
from math import isqrt
from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, TaskConfig, distinct
from .mqar import ask


class CompositionalMqarConfig(TaskConfig):
    """Multi-query associative recall of keys of two tokens (Zoology's compositional MQAR): triples of its tokens and
    the value, in any order, then each key once more, with its value as the target at the second token.

    The keys are all combinations of as many first tokens and second ones: neither alone says the value. A key is asked
    at places as in `mqar`, in groups of three.
    """

    field = "pairs"
    axis = "pairs"
    kind: Literal["compositional_mqar"] = "compositional_mqar"
    vocab_size: int = Field(default=96, ge=6, le=2**20)
    """Vocabulary size of the task: a third each are first tokens of keys, second tokens and values."""
    pairs: Difficulties | None = (4, 9)
    """Numbers of keys, squares, which rows cycle through; null for the most that fit into a sequence."""
    power_a: float = Field(default=0.01, gt=0, le=1)
    """Exponent of the power law, as in `mqar`."""
    noise: bool = True
    """Whether other positions hold random tokens, of keys and values too; otherwise token 0."""

    @property
    def n_tokens(self) -> int:
        return self.vocab_size

    @property
    def hardest(self) -> int:
        return min(isqrt(super().hardest), self._most) ** 2

    @property
    def _most(self) -> int:
        """First tokens, or second ones, of as many keys as there are tokens for."""
        third = self.vocab_size // 3
        return min(third - 1, isqrt(self.vocab_size - 2 * third))

    def length_of(self, difficulty: int) -> int:
        return 6 * difficulty  # three tokens per key, and three positions to repeat it

    def require(self, difficulty: int) -> None:
        super().require(difficulty)
        side = isqrt(difficulty)
        if side**2 != difficulty:
            raise ValueError(f"pairs {difficulty} is no square: choose {side**2} or {(side + 1) ** 2}")
        if side > self._most:
            raise ValueError(
                f"pairs {difficulty} needs more tokens than vocab_size {self.vocab_size} has, which is enough for "
                f"{self._most**2}: raise it to {3 * difficulty + 3}"
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
