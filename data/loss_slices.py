"""Slices of a text's loss: by position in the sequence, and recall hits against other tokens.

A recall hit (Zoology: Arora et al. 2023, arXiv 2312.04927) is the last token of an n-gram that occurred earlier in the
sequence but is rare in the training split, so that the parameters are unlikely to have memorised it.
"""

from itertools import count, pairwise, takewhile

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field

from ..registry import Config
from .source import Batch, LossPartition

COUNTED_TOKENS = 2**24
"""Number of tokens at the start of the training split whose n-grams are counted."""
FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Multiplier of the polynomial hash of n-grams, modulo 2^64."""


class SlicesConfig(Config):
    """Configuration of the slices of a text's targets for which evaluations report the loss separately."""

    ngram: int = Field(default=2, ge=2, le=64)
    """Length of the n-grams of recall hits in tokens: 2 for subword tokens, more for bytes."""
    most: int = Field(default=1250, ge=0)
    """Maximum number of times that the n-gram of a recall hit may occur in the training split."""


class Slices:
    """The loss slices of one text.

    Args:
        config: length and maximum frequency of the n-grams.
        train: the counted tokens of the training split.
        trained_length: length of a training sequence, in tokens.
    """

    def __init__(self, config: SlicesConfig, train: np.ndarray, trained_length: int) -> None:
        self.config = config
        self.trained_length = trained_length
        self._known = np.sort(hashes(train, config.ngram))

    def of(self, batch: Batch, documents: Int[np.ndarray, "B T"] | None = None) -> dict[str, LossPartition]:
        """Return the partitions of a batch's targets, by axis.

        The axes are `position` (bins, named by their end) and `recall` (hit or other).

        Args:
            batch: inputs and targets.
            documents: number of each input's document, if documents are packed: an n-gram then counts as repeated only
                if it occurred earlier in the same document.
        """
        inputs, targets = (part.numpy() for part in batch)
        position_bins = bins(inputs.shape[1], self.trained_length)
        sizes = [stop - start for start, stop in position_bins]
        position = np.broadcast_to(np.repeat(np.arange(len(position_bins)), sizes), inputs.shape)
        n = self.config.ngram
        is_hit = np.zeros(inputs.shape, dtype=bool)
        grams = hashes(np.concatenate((inputs, targets[:, -1:]), axis=1), n)
        if grams.shape[1]:
            is_rare = (
                np.searchsorted(self._known, grams, "right") - np.searchsorted(self._known, grams) <= self.config.most
            )
            keys = grams if documents is None else grams * FACTOR + documents[:, n - 2 :].astype(np.uint64)
            order = keys.argsort(axis=1, kind="stable")
            ordered = np.take_along_axis(keys, order, axis=1)
            is_repeated = np.zeros(grams.shape, dtype=bool)
            np.put_along_axis(is_repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
            is_hit[:, n - 2 :] = is_repeated & is_rare
        return {
            "position": LossPartition(
                [str(stop) for _, stop in position_bins], torch.from_numpy(position.astype(np.int64))
            ),
            "recall": LossPartition(["other", "hit"], torch.from_numpy(is_hit.astype(np.int64))),
        }


def hashes(tokens: Int[np.ndarray, "*B T"], n: int) -> np.ndarray:
    """Return a hash of each n-gram, uint64 [*B T-n+1]; empty if the sequence is shorter than n."""
    size = max(tokens.shape[-1] - n + 1, 0)
    values = np.zeros((*tokens.shape[:-1], size), dtype=np.uint64)
    for i in range(n):
        # via int64, because ignored targets and padding are negative
        values = values * FACTOR + tokens[..., i : i + size].astype(np.int64).astype(np.uint64) + np.uint64(1)
    return values


def bins(length: int, trained_length: int) -> list[tuple[int, int]]:
    """Return bins of the positions below `length` as (start, stop).

    Their edges are at 1/4, 1/2, 1, 2, ... times the training length.
    """
    doubling = (max(trained_length // 4, 1) << doublings for doublings in count())
    return list(pairwise([0, *takewhile(lambda edge: edge < length, doubling), length]))
