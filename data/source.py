"""What every kind of data is: a configuration that opens a source, and a source of batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from ..models import IGNORED, Tokenizer
from ..registry import Config, Registry, SeqmixError


class Batch(NamedTuple):
    """Tokens, and what is to be predicted after each."""

    inputs: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    """`IGNORED` where nothing is: after the last token of a document, or where a task asks nothing."""


class Packed(NamedTuple):
    """A batch as a model reads it: where documents are packed, in one row."""

    inputs: Int[Tensor, "..."]
    targets: Int[Tensor, "..."]
    cu_seqlens: Int[Tensor, "N+1"] | None = None
    """Document boundaries of the row, the last of which may be empty; None where every row is read through."""


class Examples(NamedTuple):
    """A batch of the validation split."""

    batch: Batch
    slices: Mapping[str, Sequence[str]] | None = None
    """For every axis of difficulty the value of each row, by which accuracy is reported; None where it is
    not measured."""


class Source(ABC):
    """What a run learns, opened. A batch is a function of (seed, step) alone."""

    name: str
    """What it is called."""
    vocab_size: int
    """Tokens there are."""
    tokenizer: Tokenizer | None = None
    """What turns its tokens into text and back; None where they stand for none."""
    bytes_per_token: float | None = None
    """Of its text; None where it is none."""
    digest: str | None = None
    """Equal for equal data; None where they are a function of the configuration."""
    unigram_entropy: float | None = None
    """Nats a token for a model that knows the frequencies of tokens and nothing else; None where nobody asks."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """What it holds, for the terminal."""

    @abstractmethod
    def training_batch(self, step: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The sequences of one step, or one rank's share of them.

        Args:
            step: the step, from 0.
            batch_size: sequences of a step, over all ranks.
            seed: another seed, other sequences.
            rank: which rows are wanted; those of all ranks, concatenated, do not depend on their number.
            world_size: number of ranks.

        Raises:
            SeqmixError: the ranks do not divide the batch.
        """

    @abstractmethod
    def evaluation_batches(self, batch_size: int, limit: int | None, length: int | None = None) -> Iterator[Examples]:
        """The validation split, the same in every run.

        Args:
            batch_size: rows of a batch.
            limit: batches, spread evenly; None for all there is.
            length: tokens of a sequence; those of training when None.
        """

    def goes_on(self, step: int, batch_size: int, seed: int) -> bool:
        """Whether the sequences of a step go on where those of the step before ended."""
        return False

    def contiguous(self, batch_size: int) -> "Source":
        """The same, where a step goes on where the one before ended.

        Raises:
            SeqmixError: it is no text, or too short for so many rows.
        """
        raise SeqmixError(f"training.carry_state goes on in a text, and {self.name} is none")

    def require_evaluation_length(self, length: int) -> None:
        """Refuse to be evaluated in sequences of another length.

        Raises:
            SeqmixError: it is no text, or its validation split is too short.
        """
        raise SeqmixError(f"training.evaluation_lengths are those of a text, and {self.name} is none")

    def packed(self, batch: Batch) -> Packed:
        """A batch with its documents packed, so that each starts from nothing; by default every row is read through."""
        return Packed(*batch)


class DataConfig(Config, ABC):
    """What a run learns: the configuration of one kind of data, and what a plug-in registers.

    A subclass declares `kind: Literal["its_name"]` and opens its source.
    """

    is_text: ClassVar[bool] = False
    """Whether sequences may have any length, and a step may go on where the one before ended."""
    kind: Any
    """The name it is registered under: a `Literal` in every subclass."""
    sequence_length: int = Field(default=256, gt=0, le=2**31)
    """Tokens of a sequence."""

    @abstractmethod
    def open(self, vocab_size: int, run: Path | None = None) -> Source:
        """The source of batches.

        Args:
            vocab_size: tokens that the model has.
            run: the run's folder, which may have a copy of a vocabulary.

        Raises:
            SeqmixError: it cannot be had, or needs more tokens.
        """

    def require_fit(self, vocab_size: int) -> None:
        """Refuse a model that has too few tokens, as far as can be told without opening the data.

        Raises:
            ValueError: it has.
        """

    def require_files(self, vocab_size: int) -> None:
        """Refuse what only a look into small files can tell: what `open` would refuse, without reading the data.

        Raises:
            SeqmixError: a file cannot be read, or needs more tokens than the model has.
        """

    def tokenizer_of(self, run: Path | None = None) -> Tokenizer | None:
        """What turns tokens into text and back; None where they stand for none.

        Args:
            run: a run's folder, whose own copy of a vocabulary is taken where there is one.

        Raises:
            SeqmixError: a vocabulary cannot be read.
        """
        return None


DATA = Registry("data", DataConfig, package="seqmix.data.kinds", entry_points="seqmix.data", default_kind="text")
"""All kinds of data: the files of `kinds`, plug-ins (entry points `seqmix.data`), and what a program registers."""


def share(rows: int, rank: int, world_size: int) -> slice:
    """The rows of one rank.

    Raises:
        SeqmixError: the ranks do not divide the batch.
    """
    if rows % world_size:
        raise SeqmixError(f"{world_size} ranks do not divide training.batch_size = {rows} into equal shares")
    each = rows // world_size
    return slice(rank * each, (rank + 1) * each)


def blank(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of token 0, and targets that ask nothing, each [rows, length]."""
    return np.zeros((rows, length), dtype=np.int64), np.full((rows, length), IGNORED, dtype=np.int64)
