"""Data order: which sequences a step reads, as stateless functions of (seed, step).

The start of a sequence is the position of its first token in a stream of `n_tokens`. A sequence needs one more token
than its length, for its last target. Every source of a mixture is a separate stream with its own order.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ..registry import SeqmixError

ROUNDS = 6
"""Rounds of the Feistel network; four already mix well."""
CYCLE = 4096
"""Length of a mixture's cycle in sequences; each cycle has every source in proportion to its weight."""
FRACTION_BITS = 36
"""Binary places of a quota. Sums over up to 2^41 cycles are then exact in float64."""


def mixture(weights: Sequence[float], batch_size: int, *, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each row of a step, and the row's number among all sequences of its source.

    A source's quota is `weight * CYCLE`, for weights that sum to 1. A cycle has as many sequences of the source: the
    quota rounded down or up, such that the share is exact over many cycles. They are spread evenly: with n sequences
    of a source, the cycle is cut into n stretches of equal length, and each stretch has one of the sequences at a
    random place. So any run of consecutive rows has each source about as often as its weight says.

    Returns:
        Two int64 arrays, [batch_size] each.
    """
    first = step * batch_size
    if len(weights) == 1:
        return np.zeros(batch_size, dtype=np.int64), first + np.arange(batch_size, dtype=np.int64)
    cycles = range(first // CYCLE, (first + batch_size - 1) // CYCLE + 1)
    drawn = np.concatenate([_draw_cycle(tuple(weights), seed, cycle) for cycle in cycles], axis=1)
    sources, numbers = drawn[:, first % CYCLE :][:, :batch_size]
    return sources, numbers


@lru_cache
def _draw_cycle(weights: tuple[float, ...], seed: int, cycle: int) -> np.ndarray:
    """Return the source of each sequence of a cycle, and its number among the source's sequences, [2, CYCLE]."""
    before = _sequences_before(weights, cycle)
    counts = _sequences_before(weights, cycle + 1) - before
    sources = np.repeat(np.arange(len(counts)), counts)
    numbers = np.arange(CYCLE) - np.repeat(np.cumsum(counts) - counts, counts)
    places = (numbers + np.random.default_rng([seed, cycle]).random(CYCLE)) / counts[sources]
    order = places.argsort(kind="stable")
    return np.stack((sources, numbers + before[sources]))[:, order]


def _sequences_before(weights: tuple[float, ...], cycle: int) -> np.ndarray:
    """Return the number of sequences of each source in all cycles before one, int64 [N].

    In cycle k, the first i sources have floor(b_i + u_k) sequences, where b_i is the sum of their quotas, and u_k in
    [0, 1) is the van der Corput sequence (the binary digits of k, mirrored at the point). In 2^j cycles that start at
    k = m 2^j, the u_k are (u_m + n) / 2^j for all n < 2^j. By Hermite's identity, their sum is floor(2^j b_i + u_m).
    """
    sums = _cumulative_quotas(weights)
    totals = np.zeros_like(sums)
    for j in range(cycle.bit_length()):
        if cycle >> j & 1:
            totals += np.floor(sums * 2.0**j + _van_der_corput((cycle >> j) - 1))
    return np.diff(totals, prepend=0.0).astype(np.int64)


def _van_der_corput(index: int) -> float:
    """Return a number of the van der Corput sequence in base 2: 0, 1/2, 1/4, 3/4, 1/8, ..."""
    return int(f"{index:b}"[::-1], 2) / 2 ** index.bit_length()


@lru_cache
def _cumulative_quotas(weights: tuple[float, ...]) -> np.ndarray:
    """Return the sum of the quotas of the first i + 1 sources, [N]; the last one is CYCLE."""
    sums = np.cumsum(quotas_of(weights))
    return np.ldexp(np.ldexp(sums / sums[-1] * CYCLE, FRACTION_BITS).round(), -FRACTION_BITS)


def quotas_of(weights: Sequence[float]) -> np.ndarray:
    """Return the sequences of each source in a cycle, float64 [N].

    They are whole numbers, as in earlier versions, if rounding changes each by less than one sequence and at most 1/32.
    """
    scaled = np.ldexp(weights, -math.frexp(max(weights))[1])  # so that even the largest weights have a finite sum
    quotas = scaled / sum(scaled.tolist()) * CYCLE
    whole = quotas.round()
    whole[whole.argmax()] += CYCLE - whole.sum()
    errors = np.abs(whole - quotas)
    return whole if ((errors < 1) & (errors <= quotas / 32)).all() else quotas


def random_starts(n_tokens: int, length: int, count: int, *, seed: int, step: int, source: int = 0) -> np.ndarray:
    """Draw the starts of `count` sequences independently and uniformly from all that fit into the stream, [count]."""
    return np.random.default_rng([seed, step, source]).integers(0, n_tokens - length, size=count)


def epoch_starts(n_tokens: int, length: int, numbers: np.ndarray, *, seed: int, source: int = 0) -> np.ndarray:
    """Return the starts of the sequences with these numbers, [N]; they read the stream once per epoch, reshuffled.

    The stream is cut into ceil((n_tokens - 1) / length) contiguous samples. Sequence number g is entry g % samples of
    the order of epoch g // samples; a step may span two epochs.
    """
    samples = -(-(n_tokens - 1) // length)
    epochs, places = np.divmod(numbers, samples)
    return permuted(places, epochs, samples, seed | source << 32) * length


def contiguous_starts(n_tokens: int, length: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """Return the starts of a step's sequences, [batch_size], each of which continues one of the previous step.

    The text is cut into one lane per row of a batch, and every row reads its lane from start to end, one window per
    step. At the end of the lanes, the text is cut again from another random offset.

    Raises:
        SeqmixError: the text is too short for one sequence per row.
    """
    windows = lane_windows(n_tokens, length, batch_size)
    n_readings, window = divmod(step, windows)
    lane = windows * length
    # the lanes do not cover the whole text: the offset decides which tokens at its start and end are skipped
    offset = np.random.default_rng([seed, n_readings]).integers(0, n_tokens - batch_size * lane)
    return offset + np.arange(batch_size) * lane + window * length


def lane_windows(n_tokens: int, length: int, batch_size: int) -> int:
    """Return the number of steps that `contiguous_starts` takes to read all lanes.

    Raises:
        SeqmixError: the text is too short for one sequence per row.
    """
    windows = (n_tokens - length) // (batch_size * length)
    if windows < 1:
        raise SeqmixError(
            f"training.carry_state reads the training split in {batch_size} parallel lanes and needs at least "
            f"{(batch_size + 1) * length} tokens, got {n_tokens}: lower training.batch_size or "
            "data.sequence_length, or add more text"
        )
    return windows


def permuted(numbers: np.ndarray, epochs: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Return the position of each sample in the order of its epoch: a permutation for every (seed, epoch).

    A Feistel network permutes numbers of 2 b bits, the fewest that hold all samples; a result out of range goes through
    it again until it is in range (cycle walking: Black and Rogaway, 2002). A permutation stored as an array would take
    memory proportional to the text, and every resumed run would have to draw it again.

    Args:
        numbers: numbers of the samples, [N].
        epochs: epoch of each sample, [N].
        samples: number of samples in an epoch.
        seed: seed of the order.
    """
    half = np.uint64(max(1, (max(samples - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = _mix_bits(_mix_bits(np.full(len(numbers), seed, dtype=np.uint64)) ^ epochs.astype(np.uint64))
    positions = numbers.astype(np.uint64)
    outside = np.ones(len(positions), dtype=bool)
    while outside.any():
        left = positions[outside] >> half
        right = positions[outside] & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (_mix_bits(right ^ _mix_bits(keys[outside] + np.uint64(turn))) & mask)
        positions[outside] = left << half | right
        outside = positions >= samples
    return positions.astype(np.int64)


def _mix_bits(x: np.ndarray) -> np.ndarray:
    """Hash 64-bit numbers so that every output bit depends on every input bit (SplitMix64: Steele et al., 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
