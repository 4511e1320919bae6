"""Modular arithmetic with and without brackets (Deletang et al. 2022, Neural Networks and the Chomsky Hierarchy,
arXiv 2207.02098; used as a test of state tracking by Grazzi et al. 2024, arXiv 2411.12537).
"""

from collections.abc import Iterator
from math import prod
from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, TaskConfig

SIGNS = "+-*()="


class ModularArithmeticConfig(TaskConfig):
    """Modular arithmetic (arXiv 2207.02098): an expression of digits, + - and *, followed by an equals sign, at which
    the target is the value modulo `modulus`. Products come first.

    Without brackets, a finite state suffices. With `brackets`, every operation is in brackets, nested at random, and a
    single operand may have a minus sign: this needs a stack.
    """

    field = "lengths"
    axis = "length"
    kind: Literal["modular_arithmetic"] = "modular_arithmetic"
    sequence_length: int = Field(default=40, gt=1, le=2**20)
    """Training sequence length in tokens."""
    modulus: int = Field(default=5, ge=2, le=1000)
    """Modulus of the arithmetic. Digits are 0 to `modulus - 1` and are their own tokens; + - * ( ) and = follow."""
    brackets: bool = False
    """True to put every operation in brackets, nested at random."""
    lengths: Difficulties | None = None
    """Numbers of tokens in an expression; rows cycle through them. Null for the longest that fits. Without brackets, an
    even length is shortened by one token. `evaluate_at` may be longer."""
    ask: Literal["last", "every"] = "last"
    """Positions with a target: `last` is the equals sign only; `every` adds the value so far at every digit, without
    brackets."""

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
            for input_row, target_row in zip(inputs, targets, strict=True):
                input_row[:end], target_row[end] = self._draw_nested(rng, end)
            return
        digits = rng.integers(self.modulus, size=(len(inputs), end // 2 + 1))
        inputs[:, 0:end:2] = digits
        inputs[:, 1:end:2] = rng.integers(plus, times + 1, size=(len(inputs), end // 2))
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

    def _draw_nested(self, rng: np.random.Generator, length: int) -> tuple[list[int], int]:
        """Draw an expression of `length` tokens with brackets, and return its tokens and its value."""
        plus, minus, times, opening, closing = range(self.modulus, self.modulus + 5)
        if length < 5:
            digit = int(rng.integers(self.modulus))
            is_negative = length % 2 == 0
            operand = [minus, digit] if is_negative else [digit]
            tokens = [opening, *operand, closing] if length > 2 else operand
            return tokens, (-digit if is_negative else digit) % self.modulus
        left_length = int(rng.integers(1, length - 3))
        left, a = self._draw_nested(rng, left_length)
        right, b = self._draw_nested(rng, length - 3 - left_length)
        sign = int(rng.integers(plus, times + 1))
        value = a + b if sign == plus else a - b if sign == minus else a * b
        return [opening, *left, sign, *right, closing], value % self.modulus

    def solve(self, tokens: list[int]) -> dict[int, int]:
        symbols = [self.name_of(token) for token in tokens]
        end = symbols.index("=")
        answers = {end: self._evaluate(iter(symbols))}
        if self.ask == "every" and not self.brackets:
            answers |= {position: self._evaluate(iter(symbols[: position + 1])) for position in range(0, end, 2)}
        return answers

    def _evaluate(self, symbols: Iterator[str]) -> int:
        """Read up to the next closing bracket, the equals sign or the end, and return the value of that part."""
        terms = [[1]]  # the factors of each term
        after_operand = False
        for symbol in symbols:
            if symbol in ")=":
                break
            if symbol in "+-" and after_operand:
                terms.append([-1 if symbol == "-" else 1])
            elif symbol == "-":
                terms[-1].append(-1)
            elif symbol != "*":
                terms[-1].append(self._evaluate(symbols) if symbol == "(" else int(symbol))
            after_operand = symbol not in "+-*"
        return sum(map(prod, terms)) % self.modulus

    def name_of(self, token: int) -> str:
        return str(token) if token < self.modulus else SIGNS[token - self.modulus]
