"""Modular arithmetic with and without brackets (Deletang et al. 2022, Neural Networks and the Chomsky Hierarchy,
arXiv 2207.02098; as a test of state tracking Grazzi et al. 2024, arXiv 2411.12537).
"""

from collections.abc import Iterator
from math import prod
from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, TaskConfig

SIGNS = "+-*()="


class ModularArithmeticConfig(TaskConfig):
    """Modular arithmetic (arXiv 2207.02098): an expression of digits, + - and *, with a target at its equals sign: its
    value modulo `modulus`, products first.

    Without brackets a finite state suffices. With `brackets` every operation is in brackets, nested at random, and a
    single operand may have a minus sign: a stack is needed.
    """

    field = "lengths"
    axis = "length"
    kind: Literal["modular_arithmetic"] = "modular_arithmetic"
    sequence_length: int = Field(default=40, gt=1, le=2**20)
    """Training sequence length in tokens."""
    modulus: int = Field(default=5, ge=2, le=1000)
    """Digits are 0 to modulus - 1, and so are tokens; then come + - * ( ) and =."""
    brackets: bool = False
    """Whether there are brackets."""
    lengths: Difficulties | None = None
    """Tokens of an expression, which rows cycle through; null for the longest that fits. Without brackets a length that
    is even is one token less. `evaluate_at` may be longer."""
    ask: Literal["last", "every"] = "last"
    """Whether the equals sign alone has a target, or every digit too: the value so far (without brackets)."""

    @property
    def n_tokens(self) -> int:
        return self.modulus + len(SIGNS)

    def length_of(self, difficulty: int) -> int:
        return difficulty + 1

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        end = difficulty if self.brackets else difficulty - (difficulty + 1) % 2
        plus = self.modulus
        minus = self.modulus + 1
        times = self.modulus + 2
        inputs[:, end] = self.modulus + SIGNS.index("=")
        if self.brackets:
            for row, wanted in zip(inputs, targets, strict=True):
                row[:end], wanted[end] = self._nested(rng, end)
            return
        digits = rng.integers(self.modulus, size=(len(inputs), end // 2 + 1))
        inputs[:, 0:end:2], inputs[:, 1:end:2] = digits, rng.integers(plus, times + 1, size=(len(inputs), end // 2))
        total = np.zeros(len(inputs), dtype=np.int64)
        product = digits[:, 0]
        for place in range(0, end, 2):
            if place:
                sign = inputs[:, place - 1]
                digit = digits[:, place // 2]
                total = np.where(sign == times, total, total + product) % self.modulus
                factor = np.where(sign == times, product, np.where(sign == minus, -1, 1))
                product = factor * digit % self.modulus
            if self.ask == "every":
                targets[:, place] = (total + product) % self.modulus
        targets[:, end] = (total + product) % self.modulus

    def _nested(self, rng: np.random.Generator, length: int) -> tuple[list[int], int]:
        """An expression of a length, and its value."""
        plus, minus, times, opened, closed = range(self.modulus, self.modulus + 5)
        if length < 5:
            digit = int(rng.integers(self.modulus))
            inner = [minus, digit] if length % 2 == 0 else [digit]
            return [opened, *inner, closed] if length > 2 else inner, (
                -digit if length % 2 == 0 else digit
            ) % self.modulus
        left = int(rng.integers(1, length - 3))
        (one, a), (other, b) = self._nested(rng, left), self._nested(rng, length - 3 - left)
        sign = int(rng.integers(plus, times + 1))
        value = a + b if sign == plus else a - b if sign == minus else a * b
        return [opened, *one, sign, *other, closed], value % self.modulus

    def solve(self, tokens: list[int]) -> dict[int, int]:
        names = [self.name_of(token) for token in tokens]
        end = names.index("=")
        answers = {end: self._value(iter(names))}
        if self.ask == "every" and not self.brackets:
            answers |= {place: self._value(iter(names[: place + 1])) for place in range(0, end, 2)}
        return answers

    def _value(self, names: Iterator[str]) -> int:
        """The value of what comes before the next closing bracket, equals sign or end."""
        terms = [[1]]
        ended = False  # factors of each term; whether an operand comes right before
        for name in names:
            if name in ")=":
                break
            if name in "+-" and ended:
                terms.append([-1 if name == "-" else 1])
            elif name == "-":
                terms[-1].append(-1)
            elif name != "*":
                terms[-1].append(self._value(names) if name == "(" else int(name))
            ended = name not in "+-*"
        return sum(map(prod, terms)) % self.modulus

    def name_of(self, token: int) -> str:
        return str(token) if token < self.modulus else SIGNS[token - self.modulus]
