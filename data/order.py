"""Data order: where the sequences of a step start in a token stream, as stateless functions of (seed, step).

Each takes the length of the stream, the sequence length (a sequence needs one more token for its last target), the
batch size, a seed and the step from 0, and returns the first token of each row, [batch_size].
"""

import numpy as np

from ..registry import SeqmixError

ROUNDS = 6
"""Rounds of the Feistel network; four already mix well."""


def random_starts(n_tokens: int, length: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """Independent random positions."""
    return np.random.default_rng([seed, step]).integers(0, n_tokens - length, size=batch_size)


def epoch_starts(n_tokens: int, length: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """ceil((n_tokens - 1) / length) contiguous samples, each once per epoch, reshuffled every epoch.

    Sequence g = step * batch_size + row is number g % samples of epoch g // samples; a batch may span two epochs.
    """
    samples = -(-(n_tokens - 1) // length)
    epochs, numbers = np.divmod(step * batch_size + np.arange(batch_size, dtype=np.int64), samples)
    return permuted(numbers, epochs, samples, seed) * length


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
    """The position of each sample in its epoch's order: a permutation for every (seed, epoch).

    A Feistel network permutes numbers of 2 b bits, the fewest that hold all samples; a result out of range goes through
    again until it is in range (cycle walking: Black and Rogaway, 2002). A permutation in an array would take memory
    proportional to the text, and every resumed run would have to draw it again.

    Args:
        numbers: integers from 0 to samples - 1, [N].
        epochs: the epoch of each, [N].
        samples: number of samples.
        seed: seed of the order.
    """
    half = np.uint64(max(1, (max(samples - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = _mixed(_mixed(np.full(len(numbers), seed, dtype=np.uint64)) ^ epochs.astype(np.uint64))
    found = numbers.astype(np.uint64)
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
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
