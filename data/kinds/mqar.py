"""Multi-query associative recall (Arora et al. 2023, Zoology, arXiv 2312.04927).

A sequence opens with pairs of a key and a value. Each key comes again once, somewhere behind them, and the value is to
be predicted behind it. Keys of a sequence are different, and so are its values.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, Rows, TaskConfig, blank, distinct


class MqarConfig(TaskConfig):
    """Multi-query associative recall (arXiv 2312.04927): pairs of keys and values, then each key once more, in any
    order, behind which its value is asked.

    The places behind the pairs are taken two by two. A key comes again at the first of the g-th two with a probability
    proportional to g^(power_a - 1), drawn without replacement, pair by pair. Keys are tokens 1 to vocab_size / 2 - 1,
    values those from vocab_size / 2 on.
    """

    field, axis = "pairs", "pairs"
    kind: Literal["mqar"] = "mqar"
    vocab_size: int = Field(default=64, ge=4, le=2**20)
    """Tokens of the task: half of them are keys, half values."""
    pairs: Difficulties | None = Field(default=(4, 8, 16), min_length=1)
    """Pairs of a sequence, in turn; null for a quarter of the tokens."""
    power_a: float = Field(default=0.01, gt=0, le=1)
    """The power law: at 1 all places are equally likely, near 0 keys come again soon."""
    noise: bool = True
    """Whether other places hold random tokens, keys and values among them; otherwise token 0."""

    @property
    def n_tokens(self) -> int:
        """Keys, values, and token 0."""
        return self.vocab_size

    @property
    def hardest(self) -> int:
        """The most pairs that fit."""
        return min(self.sequence_length // 4, self.vocab_size // 2 - 1)

    def length_of(self, difficulty: int) -> int:
        """Two tokens a pair, and two places for its key to come again."""
        return 4 * difficulty

    def require(self, difficulty: int) -> None:
        """Refuse more pairs than there are keys."""
        super().require(difficulty)
        if difficulty > (keys := self.vocab_size // 2 - 1):
            raise ValueError(
                f"pairs {difficulty} takes as many keys, and vocab_size {self.vocab_size} has {keys}: "
                f"{2 * difficulty + 2} would have enough"
            )

    def make(self, rng: np.random.Generator, rows: int, difficulty: int, length: int) -> Rows:
        """Pairs, then their keys at places drawn from the power law."""
        half, behind = self.vocab_size // 2, 2 * difficulty
        keys = 1 + distinct(rng, rows, half - 1, difficulty)
        values = half + distinct(rng, rows, self.vocab_size - half, difficulty)
        inputs, targets = blank(rows, length)
        if self.noise:
            inputs[:, behind:] = rng.integers(self.vocab_size, size=(rows, length - behind))
        inputs[:, 0:behind:2], inputs[:, 1:behind:2] = keys, values
        gaps = np.arange(1, (length - behind) // 2 + 1)
        # the order in which waiting times of these rates end is that of draws without replacement
        waiting = rng.exponential(size=(rows, len(gaps))) * gaps ** (1 - self.power_a)
        places = behind + 2 * waiting.argsort(axis=1)[:, :difficulty]
        np.put_along_axis(inputs, places, keys, axis=1)
        np.put_along_axis(targets, places, values, axis=1)
        return Rows(inputs, targets)

    def solve(self, tokens: list[int]) -> dict[int, int]:
        """A key was first seen in its pair: what stood behind it there is its value."""
        seen: dict[int, int] = {}
        answers = {}
        for place, token in enumerate(tokens):
            if token in seen:
                answers[place] = seen[token]
            elif place + 1 < len(tokens):
                seen[token] = tokens[place + 1]
        return answers

    def name_of(self, token: int) -> str:
        """Keys and values."""
        half = self.vocab_size // 2
        return "·" if token == 0 else f"k{token}" if token < half else f"v{token - half}"
