"""Induction heads: recall the token that followed an earlier occurrence (Olsson et al. 2022, arXiv 2209.11895).

The format follows the Mamba paper (Gu and Dao 2023, arXiv 2312.00752, E.2), which tests extrapolation to longer
sequences with it.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, TaskConfig, letter


class InductionHeadsConfig(TaskConfig):
    """Induction heads (arXiv 2312.00752): random symbols and one special token, which is repeated at the end. The
    target there is the symbol that followed its first occurrence.
    """

    field = "lengths"
    axis = "length"
    easiest = 3
    kind: Literal["induction_heads"] = "induction_heads"
    symbols: int = Field(default=15, gt=1, le=2**20)
    """Number of different symbols: tokens 0 to `symbols - 1`; the special token follows them."""
    lengths: Difficulties | None = None
    """Lengths up to and including the query; rows cycle through them. Null for the whole sequence. `evaluate_at` may be
    longer."""

    @property
    def n_tokens(self) -> int:
        return self.symbols + 1

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        inputs[:, :difficulty] = rng.integers(self.symbols, size=(len(inputs), difficulty))
        place = rng.integers(difficulty - 2, size=(len(inputs), 1))
        np.put_along_axis(inputs, place, self.symbols, axis=1)
        inputs[:, difficulty - 1] = self.symbols
        targets[:, difficulty - 1] = np.take_along_axis(inputs, place + 1, axis=1)[:, 0]

    def solve(self, tokens: list[int]) -> dict[int, int]:
        first = tokens.index(self.symbols)
        return {tokens.index(self.symbols, first + 1): tokens[first + 1]}

    def name_of(self, token: int) -> str:
        return "!" if token == self.symbols else letter(token, range(self.symbols))
