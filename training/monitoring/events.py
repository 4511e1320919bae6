"""Events of a run: the training loop yields them, and progress displays consume them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch

from ...data import Source


@dataclass(frozen=True)
class Started:
    """Model and data are loaded."""

    source: Source
    parameters: int
    device: torch.device
    precision: torch.dtype
    step: int
    """The first step to run, from 0."""
    processes: int = 1
    """Processes that train together."""


@dataclass(frozen=True)
class Noted:
    """A note for the user."""

    step: int
    text: str
    """One sentence."""


@dataclass(frozen=True)
class Compiled:
    """The first step, which compiles, is done."""

    step: int
    seconds: float
    """Compile time: the first step minus the second."""
    kinds: int
    """Kinds of blocks that were compiled."""


@dataclass(frozen=True)
class Stepped:
    """One optimizer step."""

    step: int
    """Steps completed."""
    loss: float
    """Nats per token of this batch."""
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    """Throughput of this step."""
    mfu: float | None = None
    """Model FLOPs utilization; None where the device's peak is unknown."""
    expert_violation: float | None = None
    """The largest load of an expert over its layer's mean, minus 1 (MaxVio); None without experts."""
    memory_bytes: int | None = None
    """Peak memory so far: of tensors on a GPU, else of the process; None where the system does not report it."""
    skipped_steps: int | None = None
    """Steps so far that left the parameters as they are; None unless steps may be skipped."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluation."""

    step: int
    loss: float
    """Nats per token of the validation split."""
    final: bool
    by_length: dict[int, float] = field(default_factory=dict)
    """The loss at each length of `training.evaluation_lengths`."""
    accuracy: float | None = None
    """Share of a task's targets that are predicted correctly; None for a text."""
    accuracy_by: dict[str, dict[str, float]] = field(default_factory=dict)
    """Accuracy for each value of each axis of difficulty."""
    loss_by: dict[str, dict[str, float]] = field(default_factory=dict)
    """Loss for each slice of `data.slices`; by position in sequences of the longest of the lengths."""


@dataclass(frozen=True)
class StoppedEarly:
    """The loss has not improved for `training.patience` evaluations: training ends."""

    step: int
    best_step: int
    best_loss: float


@dataclass(frozen=True)
class Saved:
    """One checkpoint, written asynchronously: complete before the next one starts, or when the run ends."""

    step: int
    folder: Path


Event: TypeAlias = Started | Noted | Compiled | Stepped | Evaluated | StoppedEarly | Saved
