"""Training sequences of one source, addressed by number: cut from tokens, or streamed from a dataset."""

from typing import Any, TypeAlias

import numpy as np

from ..models import Tokenizer
from .corpus_config import DocumentsConfig
from .dataset_stream import START, DatasetStream
from .order import epoch_starts, random_starts
from .token_store import Stream

Tokens: TypeAlias = np.ndarray | Stream
"""A token stream, in memory or memory-mapped: it has a length, and its slices are arrays."""
PADDING = -1
"""Value at positions of a sequence that have no token."""


class Cut:
    """Sequences cut from a range of a token stream.

    Args:
        tokens: the stream.
        span: the range of positions of this source.
        length: tokens of a sequence, without the last target.
        order: `random_windows` or `epochs`.
        source: number of the source in a mixture, which makes its order differ from those of the other sources.
    """

    def __init__(self, tokens: Tokens, span: range, length: int, order: str, source: int = 0) -> None:
        self.tokens = tokens
        self.span = span
        self.length = length
        self.order = order
        self.source = source

    def read(self, numbers: np.ndarray, selected: np.ndarray, *, seed: int, step: int) -> np.ndarray:
        """Read some of this source's sequences of a step; the last sequence of an epoch is padded.

        Args:
            numbers: numbers of all sequences of this source in the step, consecutive and ascending, [N].
            selected: True for the sequences to read, [N].
            seed: seed of the data order.
            step: the step.

        Returns:
            int64 [number of selected sequences, length + 1]; the additional token is the last target.
        """
        starts = self.starts(numbers, seed=seed, step=step)
        return windows(self.tokens, starts[selected], self.length, self.span.stop)

    def starts(self, numbers: np.ndarray, *, seed: int, step: int) -> np.ndarray:
        """Return the position of each sequence in the stream, [N]."""
        size = len(self.span)
        length = self.length
        source = self.source
        if self.order == "epochs":
            return self.span.start + epoch_starts(size, length, numbers, seed=seed, source=source)
        return self.span.start + random_starts(size, length, len(numbers), seed=seed, step=step, source=source)


class Streamed:
    """Contiguous sequences read from a streamed dataset.

    Every process reads the whole stream and keeps its own rows. Steps are read in order. Jumping to another step reads
    everything before it, unless `resume` restored the position.
    """

    def __init__(self, config: DocumentsConfig, tokenizer: Tokenizer, length: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.length = length
        self.place: dict[str, Any] | None = None
        """Position of the stream: seed, number of sequences read, and position in the dataset; None before a read."""
        self._stream: DatasetStream | None = None
        self._last_read: tuple[int, range, np.ndarray] | None = None

    def resume(self, place: dict[str, Any] | None) -> None:
        """Continue from a saved `place`."""
        self.place = place
        self._stream = None
        self._last_read = None

    def read(self, numbers: np.ndarray, selected: np.ndarray, *, seed: int, step: int) -> np.ndarray:
        """Read some of this source's sequences of a step, with the arguments of `Cut.read`."""
        first = int(numbers[0])
        count = len(numbers)
        if self._last_read is None or self._last_read[:2] != (seed, range(first, first + count)):
            self._last_read = seed, range(first, first + count), self._read_range(first, count, seed)
        return self._last_read[2][selected]

    def _read_range(self, first: int, count: int, seed: int) -> np.ndarray:
        """Read the sequences `first` to `first + count - 1`, int64 [count, length + 1]."""
        place = self.place
        if place is None or place["seed"] != seed or place["sequences"] > first:
            place = {"seed": seed, "sequences": 0, "dataset": START}
            self._stream = None
        if self._stream is None:
            self._stream = DatasetStream(self.config, self.tokenizer, seed, place["dataset"])
        for _ in range(place["sequences"], first):
            self._stream.take(self.length)
        tokens = self._stream.take(count * self.length).astype(np.int64)
        self.place = {"seed": seed, "sequences": first + count, "dataset": self._stream.place}
        return np.lib.stride_tricks.sliding_window_view(tokens, self.length + 1)[:: self.length]


def windows(tokens: Tokens, starts: np.ndarray, length: int, stop: int) -> np.ndarray:
    """Return the `length + 1` tokens from each start, padded from position `stop` on; int64 [N, length + 1]."""
    rows = np.full((len(starts), length + 1), PADDING, dtype=np.int64)
    for row, start in zip(rows, starts.tolist(), strict=True):
        part = tokens[start : min(start + length + 1, stop)]
        row[: len(part)] = part
    return rows
