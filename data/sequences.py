"""Training sequences of one source, by their numbers: cut from tokens, or streamed from a dataset."""

from typing import Any, TypeAlias

import numpy as np

from ..models import Tokenizer
from .corpus_config import DocumentsConfig
from .dataset_stream import START, DatasetStream
from .order import epoch_starts, random_starts
from .token_store import Stream

Tokens: TypeAlias = np.ndarray | Stream
"""A token stream, in memory or mapped: it has a length, and its slices are arrays."""
PADDING = -1
"""Stands where a sequence has no token."""


class Cut:
    """Sequences of a length, cut from a range of a token stream in an order, `random_windows` or `epochs`; each source
    of a mixture has its own, by its number."""

    def __init__(self, tokens: Tokens, span: range, length: int, order: str, source: int = 0) -> None:
        self.tokens = tokens
        self.span = span
        self.length = length
        self.order = order
        self.source = source

    def read(self, numbers: np.ndarray, wanted: np.ndarray, *, seed: int, step: int) -> np.ndarray:
        """Some sequences of a step, int64 [wanted, length + 1]: each has one more token for its last target. The last
        of an epoch is padded.

        `numbers` [N] are of all sequences of this source in the step, ascending without a gap; `wanted` [N] says which
        to read.
        """
        starts = self.starts(numbers, seed=seed, step=step)
        return windows(self.tokens, starts[wanted], self.length, self.span.stop)

    def starts(self, numbers: np.ndarray, *, seed: int, step: int) -> np.ndarray:
        """The position of each sequence in the stream, [N]."""
        size = len(self.span)
        length = self.length
        source = self.source
        if self.order == "epochs":
            return self.span.start + epoch_starts(size, length, numbers, seed=seed, source=source)
        return self.span.start + random_starts(size, length, len(numbers), seed=seed, step=step, source=source)


class Streamed:
    """Sequences read from a streamed dataset, side by side.

    Every process reads the whole stream and keeps its own rows. Steps are read in order; another one is reached by
    reading all before it, unless `place` gives the place.
    """

    def __init__(self, config: DocumentsConfig, tokenizer: Tokenizer, length: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.length = length
        self.place: dict[str, Any] | None = None
        """Where the stream is: seed, sequences before, and the place in the dataset. None before the first step."""
        self._stream: DatasetStream | None = None
        self._last: tuple[int, range, np.ndarray] | None = None

    def resume(self, place: dict[str, Any] | None) -> None:
        """Go on from a place."""
        self.place = place
        self._stream = None
        self._last = None

    def read(self, numbers: np.ndarray, wanted: np.ndarray, *, seed: int, step: int) -> np.ndarray:
        """As `Cut.read`."""
        if len(numbers) == 0:
            return np.empty((0, self.length + 1), dtype=np.int64)
        first = int(numbers[0])
        count = len(numbers)
        if self._last is None or self._last[:2] != (seed, range(first, first + count)):
            self._last = seed, range(first, first + count), self._read(first, count, seed)
        return self._last[2][wanted]

    def _read(self, first: int, count: int, seed: int) -> np.ndarray:
        """Sequences first to first + count - 1."""
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
    """The `length + 1` tokens from each position, padded from `stop` on; int64 [N, length + 1]."""
    found = np.full((len(starts), length + 1), PADDING, dtype=np.int64)
    for row, start in enumerate(starts.tolist()):
        part = tokens[start : min(start + length + 1, stop)]
        found[row, : len(part)] = part
    return found
