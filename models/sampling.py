"""Sampling: how the next token is chosen from logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..registry import SeqmixError

MIN_TEMPERATURE = 1e-3
"""Lowest temperature above 0: a lower one is greedy in effect, and logits divided by it may overflow."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings for sampling the next token.

    Raises:
        SeqmixError: a value is out of range.
    """

    temperature: float = 1.0
    """Temperature: logits are divided by it; 0 selects the most probable token (greedy)."""
    top_k: int | None = None
    """Number of the most probable tokens to sample from; None for all."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the most probable tokens whose probabilities add up to this."""
    seed: int = 0
    """Seed of the random generator: the same seed gives the same tokens. Row n of a batch gets the tokens that it would
    get alone with the seed `seed + n`."""

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf):
            raise SeqmixError(
                f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE:g}, got {self.temperature:g}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise SeqmixError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise SeqmixError(f"top_p must be above 0 and at most 1, got {self.top_p:g}")
        if not 0 <= self.seed < 2**63:
            raise SeqmixError(f"the seed must be from 0 to 2^63 - 1, got {self.seed}")


def sample(
    logits: Float[Tensor, "B vocab"], sampling: Sampling, generator: torch.Generator | None = None
) -> Int[Tensor, " B"]:
    """Sample one token per row of logits; without a generator, torch's global one is used."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(_probabilities(logits, sampling), 1, generator=generator)[:, 0]


def _probabilities(logits: Float[Tensor, "B vocab"], sampling: Sampling) -> Float[Tensor, "B vocab"]:
    """Return the probabilities of the tokens; those that `top_k` or `top_p` excludes have none."""
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if sampling.top_p < 1:
        ranked, order = logits.sort(descending=True)
        probabilities = ranked.softmax(-1)
        # a token stays if the more probable ones do not add up to top_p, so the first always stays
        excluded = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(excluded.scatter(1, order, excluded), float("-inf"))
    return logits.softmax(-1)


class Sampler:
    """Sampler of the tokens of N texts, whose random numbers belong to the text and the position.

    A token is argmax_v(p_v / e_v) with exponential numbers e_v, so it has the distribution p. The e_v of a position are
    drawn once. Whoever samples there, at whatever time, gets the same token from the same logits; a draft model with
    other logits mostly does too.

    Args:
        sampling: the settings.
        rows: number of texts N.
        device: device of the logits.
    """

    def __init__(self, sampling: Sampling, rows: int, device: torch.device) -> None:
        self.sampling = sampling
        self._device = device
        seeds = range(sampling.seed, sampling.seed + rows)
        self._generators = [torch.Generator(device).manual_seed(seed % 2**63) for seed in seeds]
        self._noise: list[list[Tensor]] = [[] for _ in range(rows)]

    def next_tokens(self, logits: Float[Tensor, "N vocab"]) -> Int[Tensor, " N"]:
        """Sample the next token of every text, and go on to the position after it."""
        rows = range(len(self._noise))
        tokens = self.tokens_at(logits, [(row, 0) for row in rows])
        for row in rows:
            self.advance(row, 1)
        return tokens

    def tokens_at(self, logits: Float[Tensor, "M vocab"], places: Sequence[tuple[int, int]]) -> Int[Tensor, " M"]:
        """Sample one token per row of logits; places[m] is (text, number of positions after the text's next one)."""
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        probabilities = _probabilities(logits, self.sampling)
        noise = torch.stack([self._noise_at(row, ahead, probabilities[0]) for row, ahead in places])
        return (probabilities / noise).argmax(-1)

    def advance(self, row: int, tokens: int) -> None:
        """Go on by some positions of a text, all of which have been sampled."""
        del self._noise[row][:tokens]

    def _noise_at(self, row: int, ahead: int, like: Tensor) -> Tensor:
        noise = self._noise[row]
        while len(noise) <= ahead:
            noise.append(torch.empty_like(like).exponential_(generator=self._generators[row]))
        return noise[ahead]
