"""Induction heads: what stood behind a token when it was last seen (Olsson et al. 2022, arXiv 2209.11895).

The form is that of Mamba (Gu and Dao 2023, arXiv 2312.00752, E.2), whose models extrapolate to longer sequences.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, Rows, TaskConfig, blank, letter


class InductionHeadsConfig(TaskConfig):
    """Induction heads: random symbols, among them once a special token; it comes again at the end, and what stood
    behind it is asked (arXiv 2312.00752).
    """

    field, axis = "lengths", "length"
    kind: Literal["induction_heads"] = "induction_heads"
    symbols: int = Field(default=15, gt=1, le=2**20)
    """Different symbols: tokens 0 to symbols - 1; the special token is behind them."""
    lengths: Difficulties | None = Field(default=None, min_length=1)
    """Tokens up to the question, in turn; null for the whole sequence. `evaluate_at` may ask for far more."""

    @property
    def n_tokens(self) -> int:
        """The symbols and the special token."""
        return self.symbols + 1

    @property
    def hardest(self) -> int:
        """The whole sequence."""
        return self.sequence_length if self.sequence_length >= 3 else 0

    def require(self, difficulty: int) -> None:
        """Refuse what has no room for a question."""
        if difficulty < 3:
            raise ValueError(f"a sequence of induction_heads has 3 tokens or more, and length is {difficulty}")

    def make(self, rng: np.random.Generator, rows: int, difficulty: int, length: int) -> Rows:
        """Symbols, with the special token once inside and once at the end."""
        inputs, targets = blank(rows, length)
        inputs[:, :difficulty] = rng.integers(self.symbols, size=(rows, difficulty))
        place = rng.integers(difficulty - 2, size=(rows, 1))
        np.put_along_axis(inputs, place, self.symbols, axis=1)
        inputs[:, difficulty - 1] = self.symbols
        targets[:, difficulty - 1] = np.take_along_axis(inputs, place + 1, axis=1)[:, 0]
        return Rows(inputs, targets)

    def solve(self, tokens: list[int]) -> dict[int, int]:
        """What is behind the first special token."""
        first = tokens.index(self.symbols)
        return {tokens.index(self.symbols, first + 1): tokens[first + 1]}

    def name_of(self, token: int) -> str:
        """Letters while they last."""
        return "!" if token == self.symbols else letter(token, self.symbols, first=0)
