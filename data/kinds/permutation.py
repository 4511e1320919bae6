"""Composition of permutations: the word problem of S_n (Merrill et al. 2024, The Illusion of State, arXiv 2404.08819).

From n = 5 on it is complete for NC1: models whose steps all commute, or are of constant depth, do not track its state.
"""

from functools import cache
from itertools import permutations
from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, TaskConfig


class PermutationConfig(TaskConfig):
    """Composition of permutations of n items: the target at each position (or at the last) is the product of the prefix
    (arXiv 2404.08819).

    A token is one of the n! permutations, in lexicographic order: token 0 is the identity. The product of x_1 ... x_t
    is x_t after ... after x_1.
    """

    field, axis = "lengths", "length"
    kind: Literal["permutation"] = "permutation"
    n: int = Field(default=5, ge=2, le=6)
    """Number of items."""
    lengths: Difficulties | None = None
    """Numbers of permutations, which rows cycle through; null for the whole sequence. `evaluate_at` may be longer."""
    ask: Literal["every", "last"] = "every"
    """Whether every position is a target, or the last one."""

    @property
    def n_tokens(self) -> int:
        return len(_elements(self.n))

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        inputs[:, :difficulty] = rng.integers(self.n_tokens, size=(len(inputs), difficulty))
        table, product = _table(self.n), np.zeros(len(inputs), dtype=np.int64)
        for place in range(difficulty):
            product = table[inputs[:, place], product]
            if self.ask == "every" or place == difficulty - 1:
                targets[:, place] = product

    def solve(self, tokens: list[int]) -> dict[int, int]:
        elements = _elements(self.n)
        items, answers = list(range(self.n)), {}
        for place, token in enumerate(tokens):
            items = [elements[token][item] for item in items]
            answers[place] = elements.index(tuple(items))
        return answers

    def name_of(self, token: int) -> str:
        return "".join(str(1 + item) for item in _elements(self.n)[token])  # where each item goes, from 1


@cache
def _elements(n: int) -> list[tuple[int, ...]]:
    return list(permutations(range(n)))


@cache
def _table(n: int) -> np.ndarray:
    """The number of a after b, [n! n!]."""
    elements = np.array(_elements(n))
    products = elements[np.arange(len(elements))[:, None, None], elements[None]]
    powers = n ** np.arange(n)[::-1]
    # lexicographic order is that of the numbers whose digits they are
    return np.searchsorted(elements @ powers, products @ powers)
