"""What happens in a run, as values: the loop yields them, and whoever shows them consumes them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch

from ..data import Source


@dataclass(frozen=True)
class Started:
    """Model and data are there."""

    source: Source
    parameters: int
    device: torch.device
    precision: torch.dtype
    step: int
    """The first step to be made, from 0."""
    processes: int = 1
    """That train it."""


@dataclass(frozen=True)
class Noted:
    """Something that whoever started the run should know."""

    step: int
    text: str
    """One sentence."""


@dataclass(frozen=True)
class Compiled:
    """The first step is through, and with it the compiler."""

    step: int
    seconds: float
    """What it took beyond a step that follows."""
    kinds: int
    """Kinds of blocks that were compiled."""


@dataclass(frozen=True)
class Stepped:
    """One optimizer step."""

    step: int
    """Steps made."""
    loss: float
    """Nats a token of this batch."""
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    """Of this step, from its start to its end."""
    mfu: float | None = None
    """Model FLOPs utilisation: the mixers' own operations over what the device can do; None where that is unknown."""
    memory_bytes: int | None = None
    """Most memory taken so far: on a GPU by tensors, else by the process; None where the system does not tell."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluation."""

    step: int
    loss: float
    """Nats a token of the validation split."""
    final: bool
    by_length: dict[int, float] = field(default_factory=dict)
    """The same at each further length of `training.evaluation_lengths`."""
    accuracy: float | None = None
    """Share of what a task asks that is answered right; None for a text."""
    accuracy_by: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same for each value of each axis of difficulty."""


@dataclass(frozen=True)
class StoppedEarly:
    """The loss has not become better for `training.patience` evaluations: no further step is made."""

    step: int
    best_step: int
    best_loss: float


@dataclass(frozen=True)
class Saved:
    """One checkpoint: a thread writes it while steps go on, and is done when the next one comes, or the run ends."""

    step: int
    folder: Path


Event: TypeAlias = Started | Noted | Compiled | Stepped | Evaluated | StoppedEarly | Saved
