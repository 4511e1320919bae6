"""Evaluation metrics: loss in nats per token, and accuracy for tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ...data.source import LossPartition
from ...models import IGNORED


@dataclass(frozen=True)
class Measured:
    """Metrics of one evaluation."""

    loss: float
    """Loss in nats per target."""
    n_targets: int
    """Number of targets."""
    accuracy: float | None = None
    """Fraction of targets that are the most probable token; None if not measured."""
    accuracy_by: dict[str, dict[str, float]] = field(default_factory=dict)
    """Accuracy by axis of difficulty of a task (such as the number of pairs), and by value on this axis."""
    loss_by: dict[str, dict[str, float]] = field(default_factory=dict)
    """Loss in nats per target, by axis and slice; slices without targets are left out."""


@dataclass
class Score:
    """Sums and counts over batches, as JSON types."""

    loss: float = 0.0
    """Summed loss in nats."""
    n_targets: int = 0
    """Number of targets."""
    n_correct: int | None = None
    """Number of targets predicted correctly; None if not measured."""
    correct_by: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """Number of correctly predicted targets, and of all targets, by axis of difficulty and value."""
    losses: dict[str, dict[str, tuple[float, int]]] = field(default_factory=dict)
    """Summed loss in nats, and number of targets, by axis and slice."""

    def add(
        self,
        loss: float,
        targets: Int[Tensor, "B T"],
        predicted: Int[Tensor, " M"] | None = None,
        slices: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Add the loss and the predictions of a batch.

        Args:
            loss: summed loss in nats.
            targets: the correct tokens, `IGNORED` where there is no target.
            predicted: the most probable token at each target, row by row; None without accuracy.
            slices: the value of each sequence (a row of `targets`), by axis of difficulty.
        """
        is_target = targets != IGNORED
        self.loss = self.loss + loss
        self.n_targets = self.n_targets + int(is_target.sum())
        if predicted is None:
            return
        is_correct = is_target.clone()
        is_correct[is_target] = predicted == targets[is_target]
        self.n_correct = (self.n_correct or 0) + int(is_correct.sum())
        for axis, values in (slices or {}).items():
            for value, *counts in zip(values, is_correct.sum(1).tolist(), is_target.sum(1).tolist(), strict=True):
                _count(self.correct_by, axis, value, *counts)

    def add_partition(
        self, losses: Float[Tensor, "B T"], targets: Int[Tensor, "B T"], axis: str, partition: LossPartition
    ) -> None:
        """Add the losses of a batch to the slices of an axis.

        Args:
            losses: loss of each token in nats.
            targets: the correct tokens, `IGNORED` where there is no target.
            axis: name of the axis.
            partition: names of the slices, and the slice of each token.
        """
        for number, name in enumerate(partition.names):
            in_slice = (partition.indices == number) & (targets != IGNORED)
            _count(self.losses, axis, name, losses[in_slice].double().sum().item(), int(in_slice.sum()))

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add the sums and counts of another score, given as a dictionary (`dataclasses.asdict`)."""
        self.loss = self.loss + other["loss"]
        self.n_targets = self.n_targets + other["n_targets"]
        if other["n_correct"] is not None:
            self.n_correct = (self.n_correct or 0) + other["n_correct"]
        for mine, theirs in ((self.correct_by, other["correct_by"]), (self.losses, other["losses"])):
            for axis, by_value in theirs.items():
                for value, counts in by_value.items():
                    _count(mine, axis, value, *counts)

    @property
    def measured(self) -> Measured:
        """Metrics of all batches so far."""
        n_targets = max(self.n_targets, 1)
        accuracy_by, loss_by = (
            {
                axis: {key: total / max(n, 1) for key, (total, n) in by_value.items()}
                for axis, by_value in counts.items()
            }
            for counts in (self.correct_by, {axis: _with_targets(by_value) for axis, by_value in self.losses.items()})
        )
        accuracy = None if self.n_correct is None else self.n_correct / n_targets
        return Measured(self.loss / n_targets, self.n_targets, accuracy, accuracy_by, loss_by)


def _count(counts: dict[str, dict[str, tuple[Any, int]]], axis: str, value: str, total: float, n_targets: int) -> None:
    """Add a total and a number of targets to the counts of one value of an axis."""
    by_value = counts.setdefault(axis, {})
    before = by_value.get(value, (0, 0))
    by_value[value] = (before[0] + total, before[1] + n_targets)


def _with_targets(by_value: Mapping[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """Return the losses and counts of the slices that have targets."""
    return {value: counts for value, counts in by_value.items() if counts[1]}
