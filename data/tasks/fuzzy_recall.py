"""Fuzzy in-context recall (MAD: Poli et al. 2024, Mechanistic Design and Scaling, arXiv 2403.17844)."""

from itertools import groupby
from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, NextTokenConfig


class FuzzyRecallConfig(NextTokenConfig):
    """The fuzzy in-context recall task of MAD (arXiv 2403.17844): in-context recall whose keys and values consist of
    several different tokens each. The targets are the values of keys that occurred before; the last key is always one
    of them.

    With key length n, keys have 1 to n tokens in training and n tokens in evaluation. Sequences are padded on the left.
    In MAD, a few final keys never occurred before; here they all did.
    """

    field = "key_lengths"
    axis = "key length"
    kind: Literal["fuzzy_recall"] = "fuzzy_recall"
    sequence_length: int = Field(default=128, gt=0, le=2**20)
    """Training sequence length in tokens."""
    vocab_size: int = Field(default=16, ge=3, le=2**20)
    """Vocabulary size of the task: tokens of keys, tokens of values, and the last token for padding."""
    key_lengths: Difficulties = (3,)
    """Maximum numbers of tokens in a key; rows cycle through them."""
    value_length: int = Field(default=3, gt=0)
    """Maximum number of tokens in a value; all lengths from 1 are equally likely."""

    @property
    def n_tokens(self) -> int:
        return self.vocab_size

    @property
    def _half(self) -> int:
        """Number of key tokens, and the first value token."""
        return (self.vocab_size - 1) // 2

    def length_of(self, difficulty: int) -> int:
        return 3 * (difficulty + self.value_length)

    def require(self, difficulty: int) -> None:
        super().require(difficulty)
        if max(difficulty, self.value_length) > self._half:
            raise ValueError(
                f"keys of {difficulty} and values of {self.value_length} different tokens need vocab_size "
                f"{2 * max(difficulty, self.value_length) + 1} or more, got {self.vocab_size}: raise vocab_size"
            )

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        for input_row, target_row in zip(inputs, targets, strict=True):
            self._fill_row(rng, input_row, target_row, difficulty, difficulty)

    def fill_training(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        for input_row, target_row in zip(inputs, targets, strict=True):
            self._fill_row(rng, input_row, target_row, 1, difficulty)
        self.supervise(inputs, targets)

    def _fill_row(
        self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, shortest: int, longest: int
    ) -> None:
        """Generate one example whose keys have `shortest` to `longest` tokens."""
        length = len(inputs) + 1  # the last token is a target only
        half = self._half
        longest_pair = longest + self.value_length
        max_pairs = -(-length // 2)  # a pair has at least two tokens
        sizes = rng.integers((shortest, 1), (longest + 1, self.value_length + 1), size=(max_pairs, 2)).tolist()
        orders = (rng.random((max_pairs, n)).argsort(axis=-1).tolist() for n in (half, self.vocab_size - 1 - half))
        pairs = [
            (tuple(key[:k]), [half + token for token in value[:v]])
            for key, value, (k, v) in zip(*orders, sizes, strict=True)
        ]
        (final_key, final_value), *pairs = pairs
        end = length - len(final_key) - len(final_value) - longest_pair
        shown_from = rng.integers(max(end - longest_pair, 0) + 1)
        known: dict[tuple[int, ...], list[int]] = {}
        tokens: list[int] = []
        answers: list[int] = []
        for key, new_value in pairs:
            if len(tokens) >= end:
                break
            if key == final_key or (final_key not in known and len(tokens) >= shown_from):
                key, new_value = final_key, final_value  # noqa: PLW2901
            value = known.get(key, new_value)
            tokens += key
            answers += range(len(tokens), len(tokens) + len(value)) if key in known else ()
            tokens += value
            known[key] = value
        tokens += final_key
        answers += range(len(tokens), len(tokens) + len(known[final_key]))
        tokens += known[final_key]
        start = length - len(tokens)
        inputs[:start] = self.vocab_size - 1
        inputs[start:] = tokens[:-1]
        targets[[start + place - 1 for place in answers]] = [tokens[place] for place in answers]

    def solve(self, tokens: list[int]) -> dict[int, int]:
        known: dict[tuple[int, ...], list[int]] = {}
        answers: dict[int, int] = {}
        key = ()
        place = tokens.count(self.vocab_size - 1)
        for is_key, run in groupby(tokens[place:], lambda token: token < self._half):
            run_tokens = list(run)
            if is_key:
                key = tuple(run_tokens)
                # the target at the last token of a key is the first token of its value
                answers |= {place + len(key) - 1 + i: token for i, token in enumerate(known.get(key, ()))}
            else:
                known.setdefault(key, run_tokens)
            place += len(run_tokens)
        return answers

    def name_of(self, token: int) -> str:
        half = self._half
        return "·" if token == self.vocab_size - 1 else f"k{token}" if token < half else f"v{token - half}"
