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
DIGIT = 0.25
"""Probability that an argument is a digit: otherwise it is a list."""


class ListopsConfig(TaskConfig):
    """ListOps (arXiv 1804.06028): an expression of digits, minima, maxima, medians (rounded down) and sums modulo 10,
    whose value is the target at its last bracket.

    As in the paper an argument is a digit with probability 1/4, or at the greatest depth. That depth is drawn, up to
    `depth` and the logarithm (base 2) of the length, and all again until more than half of the length is used.
    """

    field = "lengths"
    axis = "length"
    easiest = 8
    kind: Literal["listops"] = "listops"
    depth: int = Field(default=10, gt=1, le=100)
    """Most lists inside of each other: 20 in the paper, 10 in Long Range Arena."""
    arguments: int = Field(default=5, gt=1, le=100)
    """Most arguments of a list, of two at least: 5 in the paper, 10 in Long Range Arena."""
    lengths: Difficulties | None = None
    """Most tokens of an expression, which rows cycle through; null for the whole sequence."""

    @property
    def n_tokens(self) -> int:
        return len(NAMES) + 1

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        draw = Random(rng.bytes(8))
        deepest = min(self.depth, int(np.log2(difficulty)))
        inputs[:] = len(NAMES)
        for row, wanted in zip(inputs, targets, strict=True):
            tokens = list[int]()
            value = 0
            while not difficulty / 2 < len(tokens) <= difficulty:
                tokens.clear()
                value = self._draw(draw, tokens, draw.randint(2, deepest), difficulty)
            row[: len(tokens)] = tokens
            wanted[len(tokens) - 1] = value

    def _draw(self, draw: Random, tokens: list[int], depth: int, most: int) -> int:
        """Append an expression to `tokens`, of digits alone where there are too many; its value."""
        if depth == 0 or (tokens and draw.random() < DIGIT) or len(tokens) > most:
            tokens.append(draw.randrange(10))
            return tokens[-1]
        name = draw.choice(list(OPERATORS))
        tokens.append(NAMES.index(name))
        values = [self._draw(draw, tokens, depth - 1, most) for _ in range(draw.randint(2, self.arguments))]
        tokens.append(NAMES.index("]"))
        return OPERATORS[name](values)

    def solve(self, tokens: list[int]) -> dict[int, int]:
        names = [NAMES[token] for token in tokens if token < len(NAMES)]
        return {len(names) - 1: _value(iter(names))}

    def name_of(self, token: int) -> str:
        return NAMES[token] if token < len(NAMES) else "·"


def _value(names: Iterator[str]) -> int:
    """The value of the expression that begins here."""
    name = next(names)
    if name not in OPERATORS:
        return int(name) if name != "]" else -1
    values: list[int] = []
    while (value := _value(names)) >= 0:
        values.append(value)
    return OPERATORS[name](values)
