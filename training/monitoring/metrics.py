"""Evaluation metrics: loss in nats per token, and for a task accuracy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ...data.source import LossSlice
from ...models import IGNORED


@dataclass(frozen=True)
class Measured:
    """The result of an evaluation."""

    loss: float
    """Nats per target."""
    accuracy: float | None = None
    """Share of targets that are the most probable token; None where it is not measured."""
    accuracy_by: dict[str, dict[str, float]] = field(default_factory=dict)
    """Accuracy for each value of each axis of difficulty."""
    loss_by: dict[str, dict[str, float]] = field(default_factory=dict)
    """Loss for each slice of each axis, of those that have targets."""


@dataclass
class Score:
    """Counts over batches, as JSON types."""

    loss: float = 0.0
    """Summed loss in nats."""
    asked: int = 0
    """Targets."""
    right: int | None = None
    """Targets predicted correctly; None where it is not measured."""
    answers: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """Correct targets and all targets, by axis of difficulty and value."""
    losses: dict[str, dict[str, tuple[float, int]]] = field(default_factory=dict)
    """Summed loss and targets, by axis and slice."""

    def add(
        self,
        loss: float,
        targets: Int[Tensor, "B T"],
        predicted: Int[Tensor, " M"] | None = None,
        slices: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            loss: summed loss in nats.
            targets: the correct tokens, `IGNORED` where there is no target.
            predicted: the most probable token at each target, row by row; None without accuracy.
            slices: the value of each row, by axis of difficulty.
        """
        asked = targets != IGNORED
        self.loss = self.loss + loss
        self.asked = self.asked + int(asked.sum())
        if predicted is None:
            return
        right = asked.clone()
        right[asked] = predicted == targets[asked]
        self.right = (self.right or 0) + int(right.sum())
        for axis, values in (slices or {}).items():
            for value, *counts in zip(values, right.sum(1).tolist(), asked.sum(1).tolist(), strict=True):
                _count(self.answers, axis, value, *counts)

    def add_slices(self, losses: Float[Tensor, "B T"], targets: Int[Tensor, "B T"], axis: str, of: LossSlice) -> None:
        """Add a batch's losses, slice by slice of an axis."""
        for number, name in enumerate(of.names):
            chosen = (of.of == number) & (targets != IGNORED)
            _count(self.losses, axis, name, losses[chosen].double().sum().item(), int(chosen.sum()))

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add the counts of other batches: another score's `asdict`."""
        self.loss = self.loss + other["loss"]
        self.asked = self.asked + other["asked"]
        if other["right"] is not None:
            self.right = (self.right or 0) + other["right"]
        for mine, theirs in ((self.answers, other["answers"]), (self.losses, other["losses"])):
            for axis, by_value in theirs.items():
                for value, counts in by_value.items():
                    _count(mine, axis, value, *counts)

    @property
    def measured(self) -> Measured:
        """The metrics so far."""
        asked = max(self.asked, 1)
        by, loss_by = (
            {
                axis: {key: total / max(n, 1) for key, (total, n) in by_value.items()}
                for axis, by_value in counts.items()
            }
            for counts in (self.answers, {axis: _some(by_value) for axis, by_value in self.losses.items()})
        )
        return Measured(self.loss / asked, None if self.right is None else self.right / asked, by, loss_by)


def _count(counts: dict[str, dict[str, tuple[Any, int]]], axis: str, value: str, total: float, asked: int) -> None:
    by_value = counts.setdefault(axis, {})
    before = by_value.get(value, (0, 0))
    by_value[value] = (before[0] + total, before[1] + asked)


def _some(by_value: Mapping[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """The slices that have targets."""
    return {value: counts for value, counts in by_value.items() if counts[1]}
