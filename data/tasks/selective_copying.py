"""Selective copying: memorize symbols among blanks (Gu and Dao 2023, Mamba, arXiv 2312.00752, E.1; also in MAD,
Poli et al. 2024, arXiv 2403.17844).

The positions of the symbols are drawn anew for every sequence, so a model must choose by the input what to memorize.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, TaskConfig, distinct, letter


class SelectiveCopyingConfig(TaskConfig):
    """Selective copying (arXiv 2312.00752): symbols at random positions among blanks, then one query token for each
    symbol, with the symbols in order as targets.

    The query tokens are all the same, so the input never shows an answer. In the layout of MAD (arXiv 2403.17844), a
    single query token is followed by blanks, at which the symbols are the targets. The last symbol is right before the
    query token, and each blank before it precedes a symbol that is drawn uniformly.
    """

    field = "symbols"
    axis = "symbols"
    kind: Literal["selective_copying"] = "selective_copying"
    alphabet: int = Field(default=14, gt=1, le=2**20)
    """Number of different symbols: tokens 1 to `alphabet`; token 0 is blank, and the last token is the query."""
    symbols: Difficulties | None = (4, 8, 16)
    """Numbers of symbols to copy; rows cycle through them. Null for half of the sequence."""
    layout: Literal["mamba", "mad"] = "mamba"
    """Arrangement of blanks and query tokens: that of the Mamba paper or that of MAD."""

    @property
    def n_tokens(self) -> int:
        return self.alphabet + 2

    def length_of(self, difficulty: int) -> int:
        return 2 * difficulty + (self.layout == "mad")

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        rows = len(inputs)
        end = inputs.shape[1] - difficulty
        symbols = rng.integers(1, self.alphabet + 1, size=(rows, difficulty))
        if self.layout == "mad":
            next_symbols = rng.integers(difficulty, size=(rows, end - 1 - difficulty))  # the symbol after each blank
            order = np.arange(difficulty)
            places = order + (next_symbols[:, None] <= order[:, None]).sum(2)
            inputs[:, end - 1] = self.alphabet + 1
        else:
            places = np.sort(distinct(rng, rows, end, difficulty), axis=1)
            inputs[:, end:] = self.alphabet + 1
        np.put_along_axis(inputs, places, symbols, axis=1)
        targets[:, end:] = symbols

    def solve(self, tokens: list[int]) -> dict[int, int]:
        symbols = [token for token in tokens if token not in (0, self.alphabet + 1)]
        return dict(enumerate(symbols, len(tokens) - len(symbols)))

    def name_of(self, token: int) -> str:
        return {0: "·", self.alphabet + 1: "?"}.get(token) or letter(token, range(1, self.alphabet + 1))
