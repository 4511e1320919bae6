"""Interface of every kind of data: a configuration that opens a source of batches."""

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
from ..registry.deprecated import former_names


class Batch(NamedTuple):
    """Input tokens and their targets."""

    inputs: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    """`IGNORED` where there is no target: at the end of a document, or at positions that a task does not ask about."""


class Packed(NamedTuple):
    """A batch as model input: a single row if documents are packed (varlen), unchanged otherwise."""

    inputs: Int[Tensor, "..."]
    targets: Int[Tensor, "..."]
    cu_seqlens: Int[Tensor, "N+1"] | None = None
    """Document boundaries of the row; the last documents may be empty. None without packing."""


class LossPartition(NamedTuple):
    """A partition of the targets of a batch into named slices."""

    names: Sequence[str]
    """Names of the slices."""
    indices: Int[Tensor, "B T"]
    """Slice of each target, as an index into `names`."""


class Examples(NamedTuple):
    """A batch of the validation split."""

    batch: Batch
    slices: Mapping[str, Sequence[str]] | None = None
    """Difficulty of each row, as text, under the name of the difficulty (such as "pairs"): accuracy is reported for
    each difficulty. None if accuracy is not measured."""


class Source(ABC):
    """Opened training data. A batch depends only on (seed, step)."""

    name: str
    """Name of the data in messages."""
    vocab_size: int
    """Vocabulary size: tokens are 0 to vocab_size - 1."""
    tokenizer: Tokenizer | None = None
    """Tokenizer; None if tokens are not text."""
    bytes_per_token: float | None = None
    """Mean bytes per token; None if tokens are not text."""
    digest: str | None = None
    """Hash of the data; None if the configuration alone determines them."""
    unigram_entropy: float | None = None
    """Entropy of the token frequencies in nats per token; None if tokens are not text."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """A one-line summary for the terminal."""

    @abstractmethod
    def training_batch(self, step: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return the sequences of one step, or one rank's share. On a GPU, another thread calls it one step ahead.

        Args:
            step: the step, from 0.
            batch_size: sequences per step, over all ranks.
            seed: seed of the data order.
            rank: rank whose share to return; the concatenated shares of all ranks do not depend on world_size.
            world_size: number of ranks.

        Raises:
            SeqmixError: world_size does not divide batch_size.
        """

    @abstractmethod
    def evaluation_batches(self, batch_size: int, limit: int | None, length: int | None = None) -> Iterator[Examples]:
        """Yield the batches of the validation split, which are the same in every run.

        Args:
            batch_size: rows of a batch.
            limit: number of batches, spread evenly; None for all.
            length: sequence length; None for the training length.
        """

    def origin(self, step: int, batch_size: int, seed: int, row: int, token: int) -> str | None:
        """Name the document of a token of a training batch and the token's place in it; None if unknown.

        Args:
            step: step of the batch.
            batch_size: sequences per step, over all ranks.
            seed: seed of the data order.
            row: row of the token in the batch of all ranks.
            token: position of the token in its row.
        """
        return None

    def evaluation_origin(self, batch_size: int, limit: int | None, length: int, row: int, token: int) -> str | None:
        """Name the document of a token of `evaluation_batches` and the token's place in it; None if unknown.

        Args:
            batch_size: as in `evaluation_batches`.
            limit: as in `evaluation_batches`.
            length: sequence length.
            row: row of the token, counted over all batches.
            token: position of the token in its row.
        """
        return None

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state to save in a checkpoint, as JSON: the position in a stream. None without a state."""
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved `state_dict`.

        The batches are the same as without it, but the next one is found without reading all the data before it.

        Raises:
            SeqmixError: these data have no state.
        """
        raise SeqmixError(f"{self.name} has no state to resume from")

    def goes_on(self, step: int, batch_size: int, seed: int) -> bool:
        """True if the sequences of a step continue those of the previous step."""
        return False

    def contiguous(self, batch_size: int) -> "Source":
        """Return the same data in contiguous order: the sequences of each step continue those of the previous step.

        Raises:
            SeqmixError: the data are not text, or too short for the batch size.
        """
        raise SeqmixError(f"training.carry_state needs a text, got {self.name}")

    def require_evaluation_length(self, length: int) -> None:
        """Check that the validation split has a sequence of this length.

        Raises:
            SeqmixError: the data are not text, or the validation split is too short.
        """
        raise SeqmixError(f"training.evaluation_lengths needs a text, got {self.name}")

    def loss_slices(self, batch: Batch) -> Mapping[str, LossPartition]:
        """Return partitions of a batch's targets, by axis, for which evaluations report the loss; empty by default."""
        return {}

    def packed(self, batch: Batch) -> Packed:
        """Return a batch as model input, with packed documents if so configured; unchanged by default."""
        return Packed(*batch)


class DataConfig(Config, ABC):
    """Base class of the configuration of a kind of data, which a plug-in registers.

    A subclass declares `kind: Literal["its_name"]` and implements `open`.
    """

    is_text: ClassVar[bool] = False
    """True if sequences may have any length and a step may continue the previous one."""
    readout: ClassVar[Literal["each", "last"]] = "each"
    """Value of `model.readout` that the data need."""
    kind: Any
    """Registered name of the kind: a `Literal` in every subclass."""
    sequence_length: int = Field(default=256, gt=0, le=2**31)
    """Sequence length in tokens."""

    @abstractmethod
    def open(self, vocab_size: int, run: Path | None = None) -> Source:
        """Open the data and return the source of batches.

        Args:
            vocab_size: the model's vocabulary size.
            run: the run directory, which may contain a copy of the tokenizer.

        Raises:
            SeqmixError: the data cannot be opened, or need a larger vocabulary.
        """

    def require_fit(self, vocab_size: int) -> None:
        """Check the model's vocabulary size without opening the data.

        Raises:
            ValueError: the vocabulary is too small.
        """

    def require_files(self, vocab_size: int) -> None:
        """Check small files such as a tokenizer, as `open` does, without reading the data.

        Raises:
            SeqmixError: a file cannot be read, or needs a larger vocabulary.
        """

    def tokenizer_of(self, run: Path | None = None) -> Tokenizer | None:
        """Return the tokenizer; None if tokens are not text.

        Args:
            run: a run directory; its copy of the tokenizer takes precedence over the configured one.

        Raises:
            SeqmixError: a tokenizer cannot be read.
        """
        return None


DATA = Registry("data", DataConfig, package="seqmix.data.tasks", entry_points="seqmix.data", default_kind="text")
"""All kinds of data: the modules of `data/tasks`, plug-ins (entry points `seqmix.data`), and those that a program
registers."""


def share(rows: int, rank: int, world_size: int) -> slice:
    """Return the slice of a batch's rows that one data-parallel rank reads.

    Raises:
        SeqmixError: world_size does not divide the rows.
    """
    if rows % world_size:
        raise SeqmixError(f"training.batch_size = {rows} must be a multiple of the {world_size} data-parallel ranks")
    size = rows // world_size
    return slice(rank * size, (rank + 1) * size)


def blank(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs filled with token 0 and targets filled with `IGNORED`, int64 [rows, length] each."""
    return np.zeros((rows, length), dtype=np.int64), np.full((rows, length), IGNORED, dtype=np.int64)


__getattr__ = former_names(__name__, {"LossSlice": "LossPartition"})
