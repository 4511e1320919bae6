"""Parity: whether the ones so far are odd in number, which a state with positive decays alone cannot track.

(Grazzi et al. 2024, Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues, arXiv 2411.12537.)
"""

from typing import Literal

import numpy as np

from ..task import Difficulties, TaskConfig


class ParityConfig(TaskConfig):
    """Parity: bits, after each of which (or after the last) the parity of all so far is asked (arXiv 2411.12537)."""

    field, axis = "lengths", "length"
    kind: Literal["parity"] = "parity"
    lengths: Difficulties | None = None
    """Bits of a sequence, in turn; null for the whole sequence. `evaluate_at` may ask for more."""
    ask: Literal["every", "last"] = "every"
    """Whether every bit is followed by a question, or the last one."""

    @property
    def n_tokens(self) -> int:
        return 2

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        inputs[:, :difficulty] = rng.integers(2, size=(len(inputs), difficulty))
        first = 0 if self.ask == "every" else difficulty - 1
        targets[:, first:difficulty] = (inputs.cumsum(axis=1) % 2)[:, first:difficulty]

    def solve(self, tokens: list[int]) -> dict[int, int]:
        answers, parity = {}, 0
        for place, bit in enumerate(tokens):
            parity ^= bit
            answers[place] = parity
        return answers
