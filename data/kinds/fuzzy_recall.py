"""Fuzzy in-context recall (Poli et al. 2024, Mechanistic Design and Scaling, arXiv 2403.17844)."""

from itertools import groupby
from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, NextTokenConfig


class FuzzyRecallConfig(NextTokenConfig):
    """Fuzzy in-context recall of MAD (arXiv 2403.17844): as in-context recall, of keys and values of several tokens,
    all different; the targets are the values of keys that were shown before, the last one among them.

    Of length n, keys have 1 to n tokens in training and n in evaluation. Sequences are padded on the left. MAD leaves a
    few final keys unshown; here all are shown before.
    """

    field = "key_lengths"
    axis = "key length"
    kind: Literal["fuzzy_recall"] = "fuzzy_recall"
    sequence_length: int = Field(default=128, gt=0, le=2**20)
    """Training sequence length in tokens."""
    vocab_size: int = Field(default=16, ge=3, le=2**20)
    """Tokens of keys, of values, and the last one, which pads."""
    key_lengths: Difficulties = (3,)
    """Most tokens of a key, which rows cycle through."""
    value_length: int = Field(default=3, gt=0)
    """Most tokens of a value; each number up to it is as likely."""

    @property
    def n_tokens(self) -> int:
        return self.vocab_size

    @property
    def _half(self) -> int:
        return (self.vocab_size - 1) // 2

    def length_of(self, difficulty: int) -> int:
        return 3 * (difficulty + self.value_length)

    def require(self, difficulty: int) -> None:
        super().require(difficulty)
        if max(difficulty, self.value_length) > self._half:
            raise ValueError(
                f"keys of {difficulty} and values of {self.value_length} different tokens need vocab_size "
                f"{2 * max(difficulty, self.value_length) + 1} or more, and it is {self.vocab_size}"
            )

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        for row, wanted in zip(inputs, targets, strict=True):
            self._fill_row(rng, row, wanted, difficulty, difficulty)

    def fill_training(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        for row, wanted in zip(inputs, targets, strict=True):
            self._fill_row(rng, row, wanted, 1, difficulty)
        self.supervise(inputs, targets)

    def _fill_row(
        self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, shortest: int, longest: int
    ) -> None:
        length = len(inputs) + 1
        half = self._half  # the last token is a target only
        most = longest + self.value_length
        drawn = -(-length // 2)  # pairs have two tokens or more
        sizes = rng.integers((shortest, 1), (longest + 1, self.value_length + 1), size=(drawn, 2)).tolist()
        orders = (rng.random((drawn, n)).argsort(axis=-1).tolist() for n in (half, self.vocab_size - 1 - half))
        pairs = [
            (tuple(key[:k]), [half + token for token in value[:v]])
            for key, value, (k, v) in zip(*orders, sizes, strict=True)
        ]
        (probe, last), *pairs = pairs
        end = length - len(probe) - len(last) - most
        shown_at = rng.integers(max(end - most, 0) + 1)
        known: dict[tuple[int, ...], list[int]] = {}
        tokens: list[int] = []
        asked: list[int] = []
        for key, fresh in pairs:
            if len(tokens) >= end:
                break
            if key == probe or (probe not in known and len(tokens) >= shown_at):
                key, fresh = probe, last  # noqa: PLW2901
            value = known.get(key, fresh)
            tokens += key
            asked += range(len(tokens), len(tokens) + len(value)) if key in known else ()
            tokens += value
            known[key] = value
        tokens += probe
        asked += range(len(tokens), len(tokens) + len(known[probe]))
        tokens += known[probe]
        start = length - len(tokens)
        inputs[:start] = self.vocab_size - 1
        inputs[start:] = tokens[:-1]
        targets[[start + place - 1 for place in asked]] = [tokens[place] for place in asked]

    def solve(self, tokens: list[int]) -> dict[int, int]:
        known: dict[tuple[int, ...], list[int]] = {}
        answers: dict[int, int] = {}
        key = ()
        place = tokens.count(self.vocab_size - 1)
        for is_key, run in groupby(tokens[place:], lambda token: token < self._half):
            found = list(run)
            if is_key:
                key = tuple(found)
                # the first token of a value is asked at the last one of its key
                answers |= {place + len(key) - 1 + i: token for i, token in enumerate(known.get(key, ()))}
            else:
                known.setdefault(key, found)
            place += len(found)
        return answers

    def name_of(self, token: int) -> str:
        half = self._half
        return "·" if token == self.vocab_size - 1 else f"k{token}" if token < half else f"v{token - half}"
