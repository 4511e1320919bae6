"""Multi-query associative recall of keys that get another value (Zoology, after arXiv 2312.04927)."""

from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, distinct
from .mqar import MqarConfig, ask


class ForgettingMqarConfig(MqarConfig):
    """Multi-query associative recall where some keys get another value (Zoology's forgetting MQAR): after the pairs,
    `updates` of the keys come again with a new value, and then each key once more, whose last value is the target.

    All else is as in `mqar`.
    """

    kind: Literal["forgetting_mqar"] = "forgetting_mqar"  # pyright: ignore[reportIncompatibleVariableOverride]
    pairs: Difficulties | None = (4, 8, 12)
    """Numbers of pairs, which rows cycle through; null for the most that fit into a sequence."""
    updates: int = Field(default=4, gt=0)
    """Keys that get another value, at most as many as there are pairs."""

    @property
    def easiest(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.updates

    def require(self, difficulty: int) -> None:
        if 0 < difficulty < self.updates:
            raise ValueError(f"pairs {difficulty} has fewer keys than the {self.updates} of updates: lower updates")
        super().require(difficulty)

    def length_of(self, difficulty: int) -> int:
        return super().length_of(difficulty) + 2 * self.updates

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        rows = len(inputs)
        half = self.vocab_size // 2
        start = 2 * (difficulty + self.updates)
        keys = 1 + distinct(rng, rows, half - 1, difficulty)
        n_values = self.vocab_size - half
        values = distinct(rng, rows, n_values, difficulty)
        which = distinct(rng, rows, difficulty, self.updates)
        # any other value than before
        new = (np.take_along_axis(values, which, 1) + rng.integers(1, n_values, size=which.shape)) % n_values
        inputs[:, 0:start:2] = np.concatenate((keys, np.take_along_axis(keys, which, 1)), axis=1)
        inputs[:, 1:start:2] = half + np.concatenate((values, new), axis=1)
        np.put_along_axis(values, which, new, axis=1)
        ask(rng, inputs, targets, start, (keys,), half + values, self.power_a, self.noise * self.vocab_size)

    def solve(self, tokens: list[int]) -> dict[int, int]:
        pairs = [*zip(tokens[::2], tokens[1::2], strict=False)]
        first = next(n for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))  # key that comes again
        end = first + self.updates
        last = dict(pairs[:end])
        return {place: last[key] for place, key in enumerate(tokens) if place >= 2 * end and key in last}
