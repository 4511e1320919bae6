"""Parity of the ones in the prefix, which a state with only positive decays cannot track.

Source: Grazzi et al. 2024, Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues, arXiv 2411.12537.
"""

from typing import Literal

import numpy as np

from ..task import Difficulties, TaskConfig


class ParityConfig(TaskConfig):
    """Parity (arXiv 2411.12537): random bits; the target at each position (or at the last) is the parity of the
    prefix."""

    field = "lengths"
    axis = "length"
    kind: Literal["parity"] = "parity"
    lengths: Difficulties | None = None
    """Numbers of bits; rows cycle through them. Null for the whole sequence. `evaluate_at` may be longer."""
    ask: Literal["every", "last"] = "every"
    """Positions with a target: every position, or the last one only."""

    @property
    def n_tokens(self) -> int:
        return 2

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        inputs[:, :difficulty] = rng.integers(2, size=(len(inputs), difficulty))
        first = 0 if self.ask == "every" else difficulty - 1
        targets[:, first:difficulty] = (inputs.cumsum(axis=1) % 2)[:, first:difficulty]

    def solve(self, tokens: list[int]) -> dict[int, int]:
        answers = {}
        parity = 0
        for place, bit in enumerate(tokens):
            parity ^= bit
            answers[place] = parity
        return answers
