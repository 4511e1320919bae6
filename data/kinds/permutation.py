"""Composition of permutations: the word problem of S_n and other groups (Merrill et al. 2024, The Illusion of State,
arXiv 2404.08819).

Of S_5 and A_5, which are not solvable, it is complete for NC1: models whose steps all commute, or are of constant
depth, do not track its state. A_4 x Z_5 and Z_60 have as many elements as A_5 and are solvable; Z_60 commutes.
"""

from functools import cache
from itertools import combinations, compress, permutations
from math import prod
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from ..task import Difficulties, TaskConfig

MOST = 720
"""Elements of the largest group."""


class PermutationConfig(TaskConfig):
    """Composition of permutations of n items: the target at each position (or at the last) is the product of the prefix
    (arXiv 2404.08819).

    A token is one of the permutations, in lexicographic order: token 0 is the identity. The product of x_1 ... x_t is
    x_t after ... after x_1. `group` takes the permutations of one group: A4xZ5 is the direct product of the even
    permutations of four items with the rotations of five.
    """

    field = "lengths"
    axis = "length"
    kind: Literal["permutation"] = "permutation"
    n: int = Field(default=5, ge=2, le=6)
    """Number of items."""
    group: Annotated[str, Field(pattern=r"^([AS][1-6]|Z[1-9][0-9]?)(x([AS][1-6]|Z[1-9][0-9]?))*$")] | None = None
    """In place of all permutations of n items: S (all), A (even) and Z (rotations) of so many items, and products of
    them, such as S3, A5, Z60 and A4xZ5; 720 elements at most."""
    lengths: Difficulties | None = None
    """Numbers of permutations, which rows cycle through; null for the whole sequence. `evaluate_at` may be longer."""
    ask: Literal["every", "last"] = "every"
    """Whether every position is a target, or the last one."""

    @property
    def n_tokens(self) -> int:
        return prod(map(len, map(_factor, self._factors)))

    @property
    def _factors(self) -> tuple[str, ...]:
        return tuple((self.group or f"S{self.n}").split("x"))

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        inputs[:, :difficulty] = rng.integers(self.n_tokens, size=(len(inputs), difficulty))
        table = _table(self._factors)
        product = np.zeros(len(inputs), dtype=np.int64)
        for place in range(difficulty):
            product = table[inputs[:, place], product]
            if self.ask == "every" or place == difficulty - 1:
                targets[:, place] = product

    def solve(self, tokens: list[int]) -> dict[int, int]:
        elements = _elements(self._factors)
        items = list(elements[0])
        answers = {}
        for place, token in enumerate(tokens):
            items = [elements[token][item] for item in items]
            answers[place] = elements.index(tuple(items))
        return answers

    def name_of(self, token: int) -> str:
        element = _elements(self._factors)[token]
        # where each item goes, from 1; of many items, the number of the token
        return "".join(str(1 + item) for item in element) if len(element) < 10 else str(token)

    @model_validator(mode="after")
    def _group_is_small(self) -> Self:
        if self.n_tokens > MOST:
            raise ValueError(f"group {self.group} has {self.n_tokens:,} elements, and {MOST} at most are allowed")
        return self


Element = tuple[int, ...]
"""Where each item goes."""


@cache
def _factor(name: str) -> list[Element]:
    """S, A or Z of so many items, in lexicographic order."""
    n = int(name[1:])
    if name[0] == "Z":
        return [tuple((item + shift) % n for item in range(n)) for shift in range(n)]
    found = list(permutations(range(n)))
    even = (sum(a > b for a, b in combinations(element, 2)) % 2 == 0 for element in found)
    return found if name[0] == "S" else list(compress(found, even))


@cache
def _elements(factors: tuple[str, ...]) -> list[Element]:
    """The direct product, as permutations of the items of all factors side by side."""
    first, *others = factors
    found = _factor(first)
    for name in others:
        found = [(*a, *(len(a) + item for item in b)) for a in found for b in _factor(name)]
    return found


@cache
def _table(factors: tuple[str, ...]) -> np.ndarray:
    """The number of a after b, [size size]."""
    elements = np.array(_elements(factors))
    number = {element.tobytes(): i for i, element in enumerate(elements)}
    products = elements[np.arange(len(elements))[:, None, None], elements[None]]
    return np.array([[number[element.tobytes()] for element in row] for row in products])
