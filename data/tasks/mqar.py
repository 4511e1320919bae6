"""Multi-query associative recall (Arora et al. 2023, Zoology, arXiv 2312.04927)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, TaskConfig, distinct


class MqarConfig(TaskConfig):
    """Multi-query associative recall (arXiv 2312.04927): pairs of keys and values, then each key once more, in random
    order, with its value as the target. The keys of a sequence are distinct, and so are its values.

    The positions after the pairs are divided into groups of two. Each key in turn draws a group g without replacement,
    with probability proportional to g^(power_a - 1), and is repeated at the first position of that group. Keys are
    tokens 1 to vocab_size / 2 - 1, values the tokens from vocab_size / 2 on.

    The paper's vocabulary has 8,192 tokens. The small default makes a different task: with 64 tokens in sequences of
    64, the random filler shows the key of a question again before the question, in 11 to 16 % of the questions.
    """

    field = "pairs"
    axis = "pairs"
    kind: Literal["mqar"] = "mqar"
    vocab_size: int = Field(default=64, ge=4, le=2**20)
    """Vocabulary size of the task: one half for keys, one half for values."""
    pairs: Difficulties | None = (4, 8, 16)
    """Numbers of pairs; rows cycle through them. Null for as many as fit: a quarter of the sequence length."""
    power_a: float = Field(default=0.01, gt=0, le=1)
    """Exponent of the power law of the question positions: with 1 all positions are equally likely, near 0 the
    questions come soon after the pairs."""
    noise: bool = True
    """True to fill the other positions after the pairs with random tokens, including keys and values; False leaves
    token 0 there."""

    @property
    def n_tokens(self) -> int:
        return self.vocab_size

    @property
    def hardest(self) -> int:
        return min(super().hardest, self.vocab_size // 2 - 1)

    def length_of(self, difficulty: int) -> int:
        return 4 * difficulty  # two tokens per pair, and two positions to repeat its key

    def require(self, difficulty: int) -> None:
        super().require(difficulty)
        if difficulty > (keys := self.vocab_size // 2 - 1):
            raise ValueError(
                f"vocab_size {self.vocab_size} has keys for at most {keys} pairs, got {difficulty}: raise "
                f"vocab_size to {2 * difficulty + 2}"
            )

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        rows = len(inputs)
        half = self.vocab_size // 2
        start = 2 * difficulty
        keys = 1 + distinct(rng, rows, half - 1, difficulty)
        values = half + distinct(rng, rows, self.vocab_size - half, difficulty)
        inputs[:, 0:start:2], inputs[:, 1:start:2] = keys, values
        ask(rng, inputs, targets, start, (keys,), values, self.power_a, self.noise * self.vocab_size)

    def solve(self, tokens: list[int]) -> dict[int, int]:
        seen: dict[int, int] = {}
        answers = {}
        for position, token in enumerate(tokens):
            if token in seen:
                answers[position] = seen[token]
            elif position + 1 < len(tokens):
                seen[token] = tokens[position + 1]  # a key is first seen in its pair
        return answers

    def name_of(self, token: int) -> str:
        half = self.vocab_size // 2
        return "·" if token == 0 else f"k{token}" if token < half else f"v{token - half}"


def ask(
    rng: np.random.Generator,
    inputs: np.ndarray,
    targets: np.ndarray,
    start: int,
    keys: Sequence[np.ndarray],
    values: np.ndarray,
    power_a: float,
    noise: int,
) -> None:
    """Repeat each key once after `start`, with its value as the target at the key's last token.

    The positions after `start` are divided into groups, each one position longer than a key. Each key draws a group g
    without replacement, with probability proportional to g^(power_a - 1), and is written at the start of this group.

    Args:
        rng: the random generator.
        inputs: [B T], changed in place.
        targets: [B T], changed in place.
        start: first position of the questions.
        keys: the tokens of each key: one array [B N] for each token of a key.
        values: the value of each key, [B N].
        power_a: exponent of the power law.
        noise: fill the other positions with random tokens below this number; 0 leaves them unchanged.
    """
    if noise:
        inputs[:, start:] = rng.integers(noise, size=inputs[:, start:].shape)
    size = len(keys) + 1
    groups = np.arange(1, (inputs.shape[1] - start) // size + 1)
    # sorting exponential waiting times, with the weights as rates, draws groups without replacement
    waiting = rng.exponential(size=(len(inputs), len(groups))) * groups ** (1 - power_a)
    places = start + size * waiting.argsort(axis=1)[:, : values.shape[1]]
    for offset, tokens in enumerate(keys):
        np.put_along_axis(inputs, places + offset, tokens, axis=1)
    np.put_along_axis(targets, places + size - 2, values, axis=1)
