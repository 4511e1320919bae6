"""The interface of every kind of data: a configuration that opens a source of batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from ..models import IGNORED, Tokenizer
from ..registry import Config, Registry, SeqmixError


class Batch(NamedTuple):
    """Input tokens and their targets."""

    inputs: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    """`IGNORED` where there is no target: at the end of a document, or where a task asks nothing."""


class Packed(NamedTuple):
    """A batch as model input: one row where documents are packed (varlen)."""

    inputs: Int[Tensor, "..."]
    targets: Int[Tensor, "..."]
    cu_seqlens: Int[Tensor, "N+1"] | None = None
    """Document boundaries of the row; the last documents may be empty. None without packing."""


class LossSlice(NamedTuple):
    """A partition of the targets of a batch."""

    names: Sequence[str]
    of: Int[Tensor, "B T"]
    """The number of each target's name."""


class Examples(NamedTuple):
    """A batch of the validation split."""

    batch: Batch
    slices: Mapping[str, Sequence[str]] | None = None
    """The value of each row, by axis of difficulty, for reporting accuracy; None without accuracy."""


class Source(ABC):
    """Opened training data. A batch is a function of (seed, step) alone."""

    name: str
    """Name in messages."""
    vocab_size: int
    """Size of the vocabulary."""
    tokenizer: Tokenizer | None = None
    """The tokenizer; None if tokens are not text."""
    bytes_per_token: float | None = None
    """Mean bytes per token; None if it is not text."""
    digest: str | None = None
    """A hash of the data; None if they are a function of the configuration."""
    unigram_entropy: float | None = None
    """Nats per token under token frequencies alone; None if it is not text."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """A one-line summary for the terminal."""

    @abstractmethod
    def training_batch(self, step: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The sequences of one step, or one rank's share; on a GPU, another thread calls it a step ahead.

        Args:
            step: the step, from 0.
            batch_size: sequences of a step, over all ranks.
            seed: seed of the data order.
            rank: which share to return; the shares of all ranks, concatenated, do not depend on world_size.
            world_size: number of ranks.

        Raises:
            SeqmixError: world_size does not divide batch_size.
        """

    @abstractmethod
    def evaluation_batches(self, batch_size: int, limit: int | None, length: int | None = None) -> Iterator[Examples]:
        """The validation split, the same in every run.

        Args:
            batch_size: rows of a batch.
            limit: number of batches, spread evenly; None for all.
            length: sequence length; that of training when None.
        """

    def origin(self, step: int, batch_size: int, seed: int, row: int, token: int) -> str | None:
        """Where a token of a step's batch comes from, as text: its document and its place there; None if unknown."""
        return None

    def evaluation_origin(self, batch_size: int, limit: int | None, length: int, row: int, token: int) -> str | None:
        """The same of `evaluation_batches`, whose rows are numbered on from batch to batch."""
        return None

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint holds of the data, as JSON: the place in a stream; None if batches need nothing."""
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned: the next batch is found at once, and is the same as without it.

        Raises:
            SeqmixError: these data have no state.
        """
        raise SeqmixError(f"{self.name} has no state to go on from")

    def goes_on(self, step: int, batch_size: int, seed: int) -> bool:
        """Whether the sequences of a step continue those of the previous step."""
        return False

    def contiguous(self, batch_size: int) -> "Source":
        """The same data in contiguous order: each step continues the previous one.

        Raises:
            SeqmixError: it is not text, or too short for the batch size.
        """
        raise SeqmixError(f"training.carry_state needs a text, and {self.name} is not one")

    def require_evaluation_length(self, length: int) -> None:
        """Check that the validation split has a sequence of this length.

        Raises:
            SeqmixError: it is not text, or its validation split is too short.
        """
        raise SeqmixError(f"training.evaluation_lengths needs a text, and {self.name} is not one")

    def loss_slices(self, batch: Batch) -> Mapping[str, LossSlice]:
        """Partitions of a batch's targets, by axis, that evaluations measure the loss of; by default none."""
        return {}

    def packed(self, batch: Batch) -> Packed:
        """A batch with packed documents, each of which starts from an empty state; by default unchanged."""
        return Packed(*batch)


class DataConfig(Config, ABC):
    """The configuration of one kind of data, which a plug-in registers.

    A subclass declares `kind: Literal["its_name"]` and opens its source.
    """

    is_text: ClassVar[bool] = False
    """Whether sequences may have any length, and a step may continue the previous one."""
    readout: ClassVar[Literal["each", "last"]] = "each"
    """What `model.readout` has to be."""
    kind: Any
    """The name it is registered under: a `Literal` in every subclass."""
    sequence_length: int = Field(default=256, gt=0, le=2**31)
    """Sequence length in tokens."""

    @abstractmethod
    def open(self, vocab_size: int, run: Path | None = None) -> Source:
        """The source of batches.

        Args:
            vocab_size: the model's vocabulary size.
            run: the run directory, which may have its own copy of a tokenizer.

        Raises:
            SeqmixError: it cannot be opened, or needs a larger vocabulary.
        """

    def require_fit(self, vocab_size: int) -> None:
        """Check the model's vocabulary size, without opening the data.

        Raises:
            ValueError: it is too small.
        """

    def require_files(self, vocab_size: int) -> None:
        """Check small files (a tokenizer) as `open` does, without reading the data.

        Raises:
            SeqmixError: a file cannot be read, or needs a larger vocabulary.
        """

    def tokenizer_of(self, run: Path | None = None) -> Tokenizer | None:
        """The tokenizer; None if tokens are not text.

        Args:
            run: a run directory; its own copy of a tokenizer takes precedence.

        Raises:
            SeqmixError: a tokenizer cannot be read.
        """
        return None


DATA = Registry("data", DataConfig, package="seqmix.data.kinds", entry_points="seqmix.data", default_kind="text")
"""All kinds of data: the files of `kinds`, plug-ins (entry points `seqmix.data`), and those a program registers."""


def share(rows: int, rank: int, world_size: int) -> slice:
    """The rows of one rank.

    Raises:
        SeqmixError: world_size does not divide the rows.
    """
    if rows % world_size:
        raise SeqmixError(f"training.batch_size = {rows} must be a multiple of the {world_size} data-parallel ranks")
    each = rows // world_size
    return slice(rank * each, (rank + 1) * each)


def blank(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of token 0, and ignored targets, each [rows, length]."""
    return np.zeros((rows, length), dtype=np.int64), np.full((rows, length), IGNORED, dtype=np.int64)
