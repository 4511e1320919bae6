"""Data order: which sequences a step reads, as stateless functions of (seed, step).

The starts of sequences are the first token of each, [N], in a stream of `n_tokens`; a sequence needs one more token
than its length, for its last target. Every source of a mixture has its own.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ..registry import SeqmixError

ROUNDS = 6
"""Rounds of the Feistel network; four already mix well."""
CYCLE = 4096
"""Sequences in which a mixture has each source as often as its weight says."""


def mixture(weights: Sequence[float], batch_size: int, *, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The source of each row of a step, [batch_size], and the number of each among the sequences of its source.

    A cycle has `weight * CYCLE` sequences of a source (rounded, at least one), spread evenly: each lies at a random
    place of its own equal share of the cycle. So any run of rows, too, has each source about as often as its weight.
    """
    if len(weights) == 1:
        return np.zeros(batch_size, dtype=np.int64), step * batch_size + np.arange(batch_size, dtype=np.int64)
    counts = _counts(tuple(weights))
    cycles, places = np.divmod(step * batch_size + np.arange(batch_size, dtype=np.int64), CYCLE)
    sources = np.empty_like(places)
    numbers = np.empty_like(places)
    for cycle in np.unique(cycles).tolist():
        now = cycles == cycle
        of, number = _cycle(counts, seed, cycle)
        sources[now] = of[places[now]]
        numbers[now] = number[places[now]] + cycle * np.array(counts)[sources[now]]
    return sources, numbers


@lru_cache
def _counts(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Sequences of each source in a cycle; the most frequent one makes up for rounding."""
    shares = np.array(weights) / sum(weights)
    counts = np.maximum(np.round(shares * CYCLE), 1).astype(np.int64)
    counts[counts.argmax()] += CYCLE - counts.sum()
    return tuple(counts.tolist())


@lru_cache
def _cycle(counts: tuple[int, ...], seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """The source of each sequence of a cycle, and its number among those of the source; each [CYCLE]."""
    sources = np.repeat(np.arange(len(counts)), counts)
    numbers = np.concatenate([np.arange(count) for count in counts])
    places = (numbers + np.random.default_rng([seed, cycle]).random(CYCLE)) / np.repeat(counts, counts)
    order = places.argsort(kind="stable")
    return sources[order], numbers[order]


def random_starts(n_tokens: int, length: int, count: int, *, seed: int, step: int, source: int = 0) -> np.ndarray:
    """Independent random positions."""
    return np.random.default_rng([seed, step, source]).integers(0, n_tokens - length, size=count)


def epoch_starts(n_tokens: int, length: int, numbers: np.ndarray, *, seed: int, source: int = 0) -> np.ndarray:
    """ceil((n_tokens - 1) / length) contiguous samples, each once per epoch, reshuffled every epoch.

    Sequence g is number g % samples of epoch g // samples; a step may span two epochs.
    """
    samples = -(-(n_tokens - 1) // length)
    epochs, places = np.divmod(numbers, samples)
    return permuted(places, epochs, samples, seed | source << 32) * length


def contiguous_starts(n_tokens: int, length: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """Sequences that continue those of the previous step.

    The text is cut into one lane per row of a batch, and every row reads its lane from start to end, one window per
    step. At the end of the lanes they are cut again, from another offset. Raises like `lane_windows`.
    """
    windows = lane_windows(n_tokens, length, batch_size)
    reading, window = divmod(step, windows)
    lane = windows * length
    # the remainder is skipped at the start or at the end
    offset = np.random.default_rng([seed, reading]).integers(0, n_tokens - batch_size * lane)
    return offset + np.arange(batch_size) * lane + window * length


def lane_windows(n_tokens: int, length: int, batch_size: int) -> int:
    """The number of steps to read all lanes of `contiguous_starts`.

    Raises:
        SeqmixError: the text is too short for one sequence per row.
    """
    windows = (n_tokens - length) // (batch_size * length)
    if windows < 1:
        raise SeqmixError(
            f"training.carry_state reads the training split in {batch_size} parallel lanes, which takes "
            f"{(batch_size + 1) * length} tokens, and it has {n_tokens}: lower training.batch_size or "
            "data.sequence_length, or give more text"
        )
    return windows


def permuted(numbers: np.ndarray, epochs: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """The position of each sample [N] in the order of its epoch [N]: a permutation for every (seed, epoch).

    A Feistel network permutes numbers of 2 b bits, the fewest that hold all samples; a result out of range goes through
    again until it is in range (cycle walking: Black and Rogaway, 2002). A permutation in an array would take memory
    proportional to the text, and every resumed run would have to draw it again.
    """
    half = np.uint64(max(1, (max(samples - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = _mixed(_mixed(np.full(len(numbers), seed, dtype=np.uint64)) ^ epochs.astype(np.uint64))
    found = numbers.astype(np.uint64)
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        left = found[outside] >> half
        right = found[outside] & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (_mixed(right ^ _mixed(keys[outside] + np.uint64(turn))) & mask)
        found[outside] = left << half | right
        outside = found >= samples
    return found.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Every bit depends on every bit (SplitMix64: Steele, Lea and Flood, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
