"""Slices of a text's loss: by position in the sequence, and of tokens that the sequence itself shows how to predict.

A recall hit is that of Zoology (Arora et al. 2023, arXiv 2312.04927): the last token of an n-gram that the sequence has
shown before, and that is rare in the training split, so that no parameter knows it.
"""

from itertools import count, pairwise, takewhile

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field

from ..registry import Config
from .source import Batch, LossSlice

COUNTED = 2**24
"""Training tokens, the first ones, whose n-grams are counted."""
FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Of the hash of n-grams, modulo 2^64."""


class SlicesConfig(Config):
    """Slices that evaluations measure the loss of."""

    ngram: int = Field(default=2, ge=2, le=64)
    """Tokens of the n-grams of recall hits: 2 where tokens are pieces of words, more where they are bytes."""
    most: int = Field(default=1250, ge=0)
    """Occurrences in the training split above which an n-gram is no recall hit."""


class Slices:
    """The slices of one text.

    Args:
        config: which.
        train: the tokens of the training split.
        trained: length of a training sequence.
    """

    def __init__(self, config: SlicesConfig, train: np.ndarray, trained: int) -> None:
        self.config = config
        self.trained = trained
        self._known = np.sort(hashes(train, config.ngram))

    def of(self, batch: Batch, documents: Int[np.ndarray, "B T"] | None = None) -> dict[str, LossSlice]:
        """`position`, named by the first position beyond each bin, and `recall`, hits and other targets.

        Args:
            batch: inputs and targets.
            documents: the number of each input's document, where n-grams of other documents are not seen.
        """
        inputs, targets = (part.numpy() for part in batch)
        places = bins(inputs.shape[1], self.trained)
        sizes = [stop - start for start, stop in places]
        position = np.broadcast_to(np.repeat(np.arange(len(places)), sizes), inputs.shape)
        n, hit = self.config.ngram, np.zeros(inputs.shape, dtype=bool)
        grams = hashes(np.concatenate((inputs, targets[:, -1:]), axis=1), n)
        if grams.shape[1]:
            rare = (
                np.searchsorted(self._known, grams, "right") - np.searchsorted(self._known, grams) <= self.config.most
            )
            own = grams if documents is None else grams * FACTOR + documents[:, n - 2 :].astype(np.uint64)
            order = own.argsort(axis=1, kind="stable")
            ordered = np.take_along_axis(own, order, axis=1)
            shown = np.zeros(grams.shape, dtype=bool)
            np.put_along_axis(shown, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
            hit[:, n - 2 :] = shown & rare
        found = {"position": ([str(stop) for _, stop in places], position), "recall": (["other", "hit"], hit)}
        return {axis: LossSlice(names, torch.from_numpy(of.astype(np.int64))) for axis, (names, of) in found.items()}


def hashes(tokens: Int[np.ndarray, "*B T"], n: int) -> np.ndarray:
    """A hash of each n-gram, uint64 [*B T-n+1]; none of a sequence that is shorter."""
    size = max(tokens.shape[-1] - n + 1, 0)
    found = np.zeros((*tokens.shape[:-1], size), dtype=np.uint64)
    for i in range(n):
        # negative numbers stand where there is no token
        found = found * FACTOR + tokens[..., i : i + size].astype(np.int64).astype(np.uint64) + np.uint64(1)
    return found


def bins(length: int, trained: int) -> list[tuple[int, int]]:
    """Bins of positions of doubling size, with edges at 1/4, 1/2, 1, 2, ... times the training length."""
    doubling = (max(trained // 4, 1) << times for times in count())
    return list(pairwise([0, *takewhile(lambda edge: edge < length, doubling), length]))
