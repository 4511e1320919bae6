"""ListOps: nested lists with operators (Nangia and Bowman 2018, arXiv 1804.06028; Tay et al. 2020, 2011.04006)."""

from collections.abc import Iterator
from random import Random
from statistics import median
from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, TaskConfig

OPERATORS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(median(values)),
    "[SM": lambda values: sum(values) % 10,
}
NAMES = [*map(str, range(10)), *OPERATORS, "]"]
"""Token names in the order of token numbers; the blank token follows."""
DIGIT_PROBABILITY = 0.25
"""Probability that an argument is a digit; otherwise it is a list."""


class ListopsConfig(TaskConfig):
    """ListOps (arXiv 1804.06028): an expression of digits, minima, maxima, medians (rounded down) and sums modulo 10;
    the target at its last bracket is its value.

    As in the paper, an argument is a digit with probability 1/4, and always at the maximum depth. The maximum depth is
    drawn for each expression, up to `depth` and up to log2 of the length. Expressions are drawn until one fits into the
    length and uses more than half of it.
    """

    field = "lengths"
    axis = "length"
    easiest = 8
    kind: Literal["listops"] = "listops"
    depth: int = Field(default=10, gt=1, le=100)
    """Maximum depth of nested lists: 20 in the paper, 10 in Long Range Arena."""
    arguments: int = Field(default=5, gt=1, le=100)
    """Maximum number of arguments of a list; the minimum is 2. The paper uses 5, Long Range Arena 10."""
    lengths: Difficulties | None = None
    """Maximum numbers of tokens in an expression; rows cycle through them. Null for the whole sequence."""

    @property
    def n_tokens(self) -> int:
        return len(NAMES) + 1

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        draw = Random(rng.bytes(8))
        max_depth = min(self.depth, int(np.log2(difficulty)))
        inputs[:] = len(NAMES)
        for input_row, target_row in zip(inputs, targets, strict=True):
            tokens = list[int]()
            value = 0
            while not difficulty / 2 < len(tokens) <= difficulty:
                tokens.clear()
                value = self._append(draw, tokens, draw.randint(2, max_depth), difficulty)
            input_row[: len(tokens)] = tokens
            target_row[len(tokens) - 1] = value

    def _append(self, draw: Random, tokens: list[int], depth: int, max_tokens: int) -> int:
        """Append an expression to `tokens` and return its value; beyond `max_tokens`, only digits are appended."""
        if depth == 0 or (tokens and draw.random() < DIGIT_PROBABILITY) or len(tokens) > max_tokens:
            tokens.append(draw.randrange(10))
            return tokens[-1]
        name = draw.choice(list(OPERATORS))
        tokens.append(NAMES.index(name))
        values = [self._append(draw, tokens, depth - 1, max_tokens) for _ in range(draw.randint(2, self.arguments))]
        tokens.append(NAMES.index("]"))
        return OPERATORS[name](values)

    def solve(self, tokens: list[int]) -> dict[int, int]:
        names = [NAMES[token] for token in tokens if token < len(NAMES)]
        return {len(names) - 1: _evaluate(iter(names))}

    def name_of(self, token: int) -> str:
        return NAMES[token] if token < len(NAMES) else "·"


def _evaluate(names: Iterator[str]) -> int:
    """Read an expression and return its value; -1 at a closing bracket."""
    name = next(names)
    if name not in OPERATORS:
        return int(name) if name != "]" else -1
    values: list[int] = []
    while (value := _evaluate(names)) >= 0:
        values.append(value)
    return OPERATORS[name](values)
