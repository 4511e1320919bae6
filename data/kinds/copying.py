"""Copying: a sequence is read, and then written (Jelassi et al. 2024, Repeat After Me, arXiv 2402.01032)."""

from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, Rows, TaskConfig, blank, letter


class CopyingConfig(TaskConfig):
    """Copying: symbols, a token that asks, and the symbols again, each of which is to be predicted (arXiv 2402.01032).

    Symbols are drawn evenly and may repeat. What is behind the copy is blank.
    """

    field, axis = "lengths", "length"
    kind: Literal["copying"] = "copying"
    symbols: int = Field(default=26, gt=1, le=2**20)
    """Different symbols: tokens 1 to symbols; token 0 is blank, and the last one asks."""
    lengths: Difficulties | None = Field(default=None, min_length=1)
    """Symbols of a sequence, in turn; null for half of the tokens."""

    @property
    def n_tokens(self) -> int:
        """Blank, the symbols, and the token that asks."""
        return self.symbols + 2

    @property
    def hardest(self) -> int:
        """Half of the tokens."""
        return self.sequence_length // 2

    def length_of(self, difficulty: int) -> int:
        """The symbols, the token that asks, and all but the last symbol again."""
        return 2 * difficulty

    def make(self, rng: np.random.Generator, rows: int, difficulty: int, length: int) -> Rows:
        """Symbols, and the symbols again."""
        inputs, targets = blank(rows, length)
        symbols = rng.integers(1, self.symbols + 1, size=(rows, difficulty))
        inputs[:, :difficulty] = symbols
        inputs[:, difficulty] = self.symbols + 1
        inputs[:, difficulty + 1 : 2 * difficulty] = symbols[:, :-1]
        targets[:, difficulty : 2 * difficulty] = symbols
        return Rows(inputs, targets)

    def solve(self, tokens: list[int]) -> dict[int, int]:
        """The symbols before the token that asks, from the first one on."""
        asked = tokens.index(self.symbols + 1)
        return {asked + i: symbol for i, symbol in enumerate(tokens[:asked])}

    def name_of(self, token: int) -> str:
        """Letters while they last."""
        if token == 0:
            return "·"
        return "copy" if token > self.symbols else letter(token, self.symbols)
