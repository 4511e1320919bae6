"""Parity: whether the ones so far are odd in number, which a state with positive decays alone cannot track.

(Grazzi et al. 2024, Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues, arXiv 2411.12537.)
"""

from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, Rows, TaskConfig, blank


class ParityConfig(TaskConfig):
    """Parity: bits, behind each of which (or behind the last) the parity of all so far is asked (arXiv 2411.12537)."""

    field, axis = "lengths", "length"
    kind: Literal["parity"] = "parity"
    lengths: Difficulties | None = Field(default=None, min_length=1)
    """Bits of a sequence, in turn; null for the whole sequence. `evaluate_at` may ask for more."""
    ask: Literal["every", "last"] = "every"
    """Whether every bit is followed by a question, or the last one."""

    @property
    def n_tokens(self) -> int:
        """0 and 1."""
        return 2

    def make(self, rng: np.random.Generator, rows: int, difficulty: int, length: int) -> Rows:
        """Bits, and their running sum modulo 2."""
        inputs, targets = blank(rows, length)
        bits = rng.integers(2, size=(rows, difficulty))
        inputs[:, :difficulty] = bits
        first = 0 if self.ask == "every" else difficulty - 1
        targets[:, first:difficulty] = (bits.cumsum(axis=1) % 2)[:, first:]
        return Rows(inputs, targets)

    def solve(self, tokens: list[int]) -> dict[int, int]:
        """A running exclusive or."""
        answers, parity = {}, 0
        for place, bit in enumerate(tokens):
            parity ^= bit
            answers[place] = parity
        return answers
