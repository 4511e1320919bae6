"""Selective copying: memorize symbols among blanks (Gu and Dao 2023, Mamba, arXiv 2312.00752, E.1; also of MAD,
Poli et al. 2024, arXiv 2403.17844).

Positions are drawn for every sequence, so what a model memorizes must depend on its input.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, TaskConfig, distinct, letter


class SelectiveCopyingConfig(TaskConfig):
    """Selective copying: symbols at random positions among blanks, then as many query tokens, with the symbols in
    order as targets (arXiv 2312.00752).

    The query tokens at the end are all the same: no answer is shown. In the layout of MAD (arXiv 2403.17844) one query
    token is followed by blanks, at which the symbols are the targets, and a symbol comes right before it; each blank
    stands before one of the symbols, any with equal probability.
    """

    field = "symbols"
    axis = "symbols"
    kind: Literal["selective_copying"] = "selective_copying"
    alphabet: int = Field(default=14, gt=1, le=2**20)
    """Different symbols: tokens 1 to alphabet; token 0 is blank, and the last one is the query."""
    symbols: Difficulties | None = (4, 8, 16)
    """Numbers of symbols, which rows cycle through; null for half of the sequence."""
    layout: Literal["mamba", "mad"] = "mamba"
    """Where blanks and queries are."""

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
            before = rng.integers(difficulty, size=(rows, end - 1 - difficulty))
            order = np.arange(difficulty)
            places = order + (before[:, None] <= order[:, None]).sum(2)
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
