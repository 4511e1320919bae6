"""Evaluation metrics: loss in nats per token, and for a task accuracy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int
from torch import Tensor

from ..models import IGNORED


@dataclass(frozen=True)
class Measured:
    """The result of an evaluation."""

    loss: float
    """Nats per target."""
    accuracy: float | None = None
    """Share of targets that are the most probable token; None where it is not measured."""
    accuracy_by: dict[str, dict[str, float]] = field(default_factory=dict)
    """Accuracy for each value of each axis of difficulty."""


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
        self.loss, self.asked = self.loss + loss, self.asked + int(asked.sum())
        if predicted is None:
            return
        right = asked.clone()
        right[asked] = predicted == targets[asked]
        self.right = (self.right or 0) + int(right.sum())
        for axis, values in (slices or {}).items():
            for value, *counts in zip(values, right.sum(1).tolist(), asked.sum(1).tolist(), strict=True):
                self._count(axis, value, *counts)

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add the counts of other batches: another score's `asdict`."""
        self.loss, self.asked = self.loss + other["loss"], self.asked + other["asked"]
        if other["right"] is not None:
            self.right = (self.right or 0) + other["right"]
        for axis, by_value in other["answers"].items():
            for value, counts in by_value.items():
                self._count(axis, value, *counts)

    @property
    def measured(self) -> Measured:
        """The metrics so far."""
        asked = max(self.asked, 1)
        by = {
            axis: {value: right / max(all_, 1) for value, (right, all_) in by_value.items()}
            for axis, by_value in self.answers.items()
        }
        return Measured(self.loss / asked, None if self.right is None else self.right / asked, by)

    def _count(self, axis: str, value: str, right: int, asked: int) -> None:
        by_value = self.answers.setdefault(axis, {})
        before = by_value.get(value, (0, 0))
        by_value[value] = (before[0] + right, before[1] + asked)
