"""Multi-query associative recall (Arora et al. 2023, Zoology, arXiv 2312.04927)."""

from typing import Literal

import numpy as np
from pydantic import Field

from ..task import Difficulties, TaskConfig, distinct


class MqarConfig(TaskConfig):
    """Multi-query associative recall (arXiv 2312.04927): pairs of keys and values, then each key once more, in any
    order, behind which its value is asked. Keys of a sequence are different, and so are its values.

    The places behind the pairs are taken two by two. A key comes again at the first of the g-th two with a probability
    proportional to g^(power_a - 1), drawn without replacement, pair by pair. Keys are tokens 1 to vocab_size / 2 - 1,
    values those from vocab_size / 2 on.
    """

    field, axis = "pairs", "pairs"
    kind: Literal["mqar"] = "mqar"
    vocab_size: int = Field(default=64, ge=4, le=2**20)
    """Tokens of the task: half of them are keys, half values."""
    pairs: Difficulties | None = (4, 8, 16)
    """Pairs of a sequence, in turn; null for a quarter of the tokens."""
    power_a: float = Field(default=0.01, gt=0, le=1)
    """The power law: at 1 all places are equally likely, near 0 keys come again soon."""
    noise: bool = True
    """Whether other places hold random tokens, keys and values among them; otherwise token 0."""

    @property
    def n_tokens(self) -> int:
        return self.vocab_size

    @property
    def hardest(self) -> int:
        return min(super().hardest, self.vocab_size // 2 - 1)

    def length_of(self, difficulty: int) -> int:
        return 4 * difficulty  # two tokens a pair, and two places for its key to come again

    def require(self, difficulty: int) -> None:
        super().require(difficulty)
        if difficulty > (keys := self.vocab_size // 2 - 1):
            raise ValueError(
                f"pairs {difficulty} takes as many keys, and vocab_size {self.vocab_size} has {keys}: "
                f"{2 * difficulty + 2} would have enough"
            )

    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        (rows, length), half, behind = inputs.shape, self.vocab_size // 2, 2 * difficulty
        keys = 1 + distinct(rng, rows, half - 1, difficulty)
        values = half + distinct(rng, rows, self.vocab_size - half, difficulty)
        if self.noise:
            inputs[:, behind:] = rng.integers(self.vocab_size, size=(rows, length - behind))
        inputs[:, 0:behind:2], inputs[:, 1:behind:2] = keys, values
        gaps = np.arange(1, (length - behind) // 2 + 1)
        # the order in which waiting times of these rates end is that of draws without replacement
        waiting = rng.exponential(size=(rows, len(gaps))) * gaps ** (1 - self.power_a)
        places = behind + 2 * waiting.argsort(axis=1)[:, :difficulty]
        np.put_along_axis(inputs, places, keys, axis=1)
        np.put_along_axis(targets, places, values, axis=1)

    def solve(self, tokens: list[int]) -> dict[int, int]:
        seen: dict[int, int] = {}
        answers = {}
        for place, token in enumerate(tokens):
            if token in seen:
                answers[place] = seen[token]
            elif place + 1 < len(tokens):
                seen[token] = tokens[place + 1]  # a key is first seen in its pair
        return answers

    def name_of(self, token: int) -> str:
        half = self.vocab_size // 2
        return "·" if token == 0 else f"k{token}" if token < half else f"v{token - half}"
