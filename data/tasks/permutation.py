"""Composition of permutations: the word problem of S_n and other groups (Merrill et al. 2024, The Illusion of State,
arXiv 2404.08819).

For S_5 and A_5, which are not solvable, the problem is complete for NC1: models of constant depth, or whose steps all
commute, cannot track its state. A_4 x Z_5 and Z_60 have as many elements as A_5 but are solvable; Z_60 is commutative.
"""

from functools import cache
from itertools import combinations, compress, permutations
from math import prod
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from ..task import Difficulties, TaskConfig

MAX_ELEMENTS = 720
"""Maximum number of elements of a group: those of S_6."""


class PermutationConfig(TaskConfig):
    """Composition of permutations of n items: the target at each position (or at the last) is the product of the prefix
    (arXiv 2404.08819).

    Tokens number the permutations in lexicographic order; token 0 is the identity. The product of x_1 ... x_t applies
    x_1 first and x_t last. `group` restricts the permutations to those of one group: A4xZ5 is the direct product of the
    even permutations of four items and the rotations of five.
    """

    field = "lengths"
    axis = "length"
    kind: Literal["permutation"] = "permutation"
    n: int = Field(default=5, ge=2, le=6)
    """Number of items."""
    group: Annotated[str, Field(pattern=r"^([AS][1-6]|Z[1-9][0-9]?)(x([AS][1-6]|Z[1-9][0-9]?))*$")] | None = None
    """Group to use instead of all permutations of n items: S (all permutations), A (even permutations) or Z (rotations)
    followed by the number of items, or a product such as A4xZ5; at most 720 elements."""
    lengths: Difficulties | None = None
    """Numbers of permutations; rows cycle through them. Null for the whole sequence. `evaluate_at` may be longer."""
    ask: Literal["every", "last"] = "every"
    """Positions with a target: every position, or the last one only."""

    @property
    def n_tokens(self) -> int:
        return prod(map(len, map(_factor, self._factors)))

    @property
    def _factors(self) -> tuple[str, ...]:
        """Names of the groups whose direct product is used, such as A4 and Z5."""
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
        # the image of each item, counted from 1; with many items, the token's number
        return "".join(str(1 + item) for item in element) if len(element) < 10 else str(token)

    @model_validator(mode="after")
    def _group_is_small(self) -> Self:
        if self.n_tokens > MAX_ELEMENTS:
            raise ValueError(f"group must have at most {MAX_ELEMENTS} elements, got {self.n_tokens:,} in {self.group}")
        return self


Element = tuple[int, ...]
"""A permutation: the image of each item."""


@cache
def _factor(name: str) -> list[Element]:
    """Return all permutations in a group named S, A or Z and a number of items (such as A4), in lexicographic order."""
    n = int(name[1:])
    if name[0] == "Z":
        return [tuple((item + shift) % n for item in range(n)) for shift in range(n)]
    elements = list(permutations(range(n)))
    even = (sum(a > b for a, b in combinations(element, 2)) % 2 == 0 for element in elements)
    return elements if name[0] == "S" else list(compress(elements, even))


@cache
def _elements(factors: tuple[str, ...]) -> list[Element]:
    """Return the elements of the direct product, as permutations of the concatenated items of all factors."""
    first, *others = factors
    elements = _factor(first)
    for name in others:
        elements = [(*a, *(len(a) + item for item in b)) for a in elements for b in _factor(name)]
    return elements


@cache
def _table(factors: tuple[str, ...]) -> np.ndarray:
    """Return the group's multiplication table [size size]: entry (a, b) is the number of "b first, then a"."""
    elements = np.array(_elements(factors))
    number = {element.tobytes(): i for i, element in enumerate(elements)}
    products = elements[np.arange(len(elements))[:, None, None], elements[None]]
    return np.array([[number[element.tobytes()] for element in row] for row in products])
