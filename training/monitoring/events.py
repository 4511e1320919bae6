"""Events of a run: the training loop yields them, and progress displays consume them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch

from ...data import Source


@dataclass(frozen=True)
class Started:
    """Training starts: model and data are loaded."""

    source: Source
    """Training data."""
    parameters: int
    """Number of parameters of the model."""
    device: torch.device
    """Device of this process."""
    precision: torch.dtype
    """Dtype of matrix products."""
    step: int
    """First step to run, from 0."""
    processes: int = 1
    """Number of processes."""


@dataclass(frozen=True)
class Noted:
    """A note for the user."""

    step: int
    """Number of steps completed so far."""
    text: str
    """Text of the note, one sentence."""


@dataclass(frozen=True)
class Compiled:
    """Compilation is done. The event comes after the second step, whose time is needed to know the compile time."""

    step: int
    """Number of steps completed so far."""
    seconds: float
    """Compile time in seconds: the first step's time minus the second's."""
    kinds: int
    """Number of kinds of blocks that were compiled."""


@dataclass(frozen=True)
class Stepped:
    """One optimizer step was made, or skipped."""

    step: int
    """Number of steps completed so far."""
    loss: float
    """Loss of this batch, in nats per token."""
    learning_rate: float
    """Learning rate of this step."""
    gradient_norm: float
    """Gradient norm before clipping."""
    tokens_per_second: float
    """Throughput of this step, in tokens per second over all processes."""
    mfu: float | None = None
    """Model FLOPs utilization, a fraction of the peak rate; None if that rate is unknown."""
    expert_violation: float | None = None
    """Largest load of an expert divided by its layer's mean load, minus 1 (MaxVio); None without experts."""
    memory_bytes: int | None = None
    """Peak memory so far: of tensors on a GPU, else of the process; None if the system does not report it."""
    skipped_steps: int | None = None
    """Number of steps skipped so far; None unless the configuration allows skipping."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluation was made."""

    step: int
    """Number of steps completed so far."""
    loss: float
    """Validation loss, in nats per token."""
    final: bool
    """True for the final evaluation, of `training.final_evaluation_batches` batches."""
    by_length: dict[int, float] = field(default_factory=dict)
    """Validation loss in nats per token, by length in `training.evaluation_lengths`."""
    accuracy: float | None = None
    """Fraction of a task's targets that are predicted correctly; None for a text."""
    accuracy_by: dict[str, dict[str, float]] = field(default_factory=dict)
    """Accuracy by axis of difficulty of a task (such as the number of pairs), and by value on this axis."""
    loss_by: dict[str, dict[str, float]] = field(default_factory=dict)
    """Loss in nats per token, by axis of `data.slices` and by slice. The losses by position are those of the longest
    evaluated sequences."""
    tokens: int = field(kw_only=True)
    """Number of tokens that `loss` is the mean of."""


@dataclass(frozen=True)
class StoppedEarly:
    """Training ends early: the loss has not improved for `training.patience` evaluations."""

    step: int
    """Number of steps completed so far."""
    best_step: int
    """Step of the best evaluation."""
    best_loss: float
    """Validation loss of the best evaluation, in nats per token."""


@dataclass(frozen=True)
class OutOfTime:
    """Training ends at its time budget, `training.max_time`."""

    step: int
    """Number of steps completed so far."""
    seconds: float
    """The time budget, in seconds."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint is being written, asynchronously: it is complete before the next one starts, or the run ends."""

    step: int
    """Number of steps completed so far."""
    folder: Path
    """Folder of the checkpoint."""


Event: TypeAlias = Started | Noted | Compiled | Stepped | Evaluated | StoppedEarly | OutOfTime | Saved
