"""Copying (Jelassi et al. 2024, Repeat After Me, arXiv 2402.01032)."""

from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, TaskConfig, letter


class CopyingConfig(TaskConfig):
    """Copying (arXiv 2402.01032): symbols, a query token, and the symbols again as targets.

    Symbols are drawn uniformly and may repeat. The rest of the sequence is blank.
    """

    field = "lengths"
    axis = "length"
    kind: Literal["copying"] = "copying"
    symbols: int = Field(default=26, gt=1, le=2**20)
    """Number of different symbols: tokens 1 to `symbols`; token 0 is blank, and the last token is the query."""
    lengths: Difficulties | None = None
    """Numbers of symbols to copy; rows cycle through them. Null for half of the sequence."""

    @property
    def n_tokens(self) -> int:
        return self.symbols + 2

    def length_of(self, difficulty: int) -> int:
        return 2 * difficulty  # the last symbol is a target only

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        symbols = rng.integers(1, self.symbols + 1, size=(len(inputs), difficulty))
        inputs[:, :difficulty] = symbols
        inputs[:, difficulty] = self.symbols + 1
        inputs[:, difficulty + 1 : 2 * difficulty] = symbols[:, :-1]
        targets[:, difficulty : 2 * difficulty] = symbols

    def solve(self, tokens: list[int]) -> dict[int, int]:
        query = tokens.index(self.symbols + 1)
        return {query + i: symbol for i, symbol in enumerate(tokens[:query])}

    def name_of(self, token: int) -> str:
        return {0: "·", self.symbols + 1: "copy"}.get(token) or letter(token, range(1, self.symbols + 1))
