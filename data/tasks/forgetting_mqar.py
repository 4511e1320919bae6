"""Multi-query associative recall with keys that get a new value (Zoology, after arXiv 2312.04927)."""

from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, distinct
from .mqar import MqarConfig, ask


class ForgettingMqarConfig(MqarConfig):
    """Multi-query associative recall in which some keys get a new value (Zoology's forgetting MQAR): after the pairs,
    `updates` of the keys are repeated with a new value; then each key appears once more, with its latest value as the
    target.

    Everything else is as in `mqar`.
    """

    kind: Literal["forgetting_mqar"] = "forgetting_mqar"  # pyright: ignore[reportIncompatibleVariableOverride]
    pairs: Difficulties | None = (4, 8, 12)
    """Numbers of pairs; rows cycle through them. Null for the most that fit into a sequence."""
    updates: int = Field(default=4, gt=0)
    """Number of keys that get a new value; at most the number of pairs."""

    @property
    def easiest(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.updates

    def require(self, difficulty: int) -> None:
        if 0 < difficulty < self.updates:
            raise ValueError(
                f"pairs must be at least {self.updates}, the number of updates, got {difficulty}: lower updates"
            )
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
        updated = distinct(rng, rows, difficulty, self.updates)
        # a shift by 1 to n_values - 1 never gives the old value
        new = (np.take_along_axis(values, updated, 1) + rng.integers(1, n_values, size=updated.shape)) % n_values
        inputs[:, 0:start:2] = np.concatenate((keys, np.take_along_axis(keys, updated, 1)), axis=1)
        inputs[:, 1:start:2] = half + np.concatenate((values, new), axis=1)
        np.put_along_axis(values, updated, new, axis=1)
        ask(rng, inputs, targets, start, (keys,), half + values, self.power_a, self.noise * self.vocab_size)

    def solve(self, tokens: list[int]) -> dict[int, int]:
        pairs = [*zip(tokens[::2], tokens[1::2], strict=False)]
        first_update = next(n for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
        end = first_update + self.updates
        latest = dict(pairs[:end])
        return {place: latest[key] for place, key in enumerate(tokens) if place >= 2 * end and key in latest}
