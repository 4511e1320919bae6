"""What an evaluation finds: nats a token, and of a task the share of answers that are right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int
from torch import Tensor

from ..models import IGNORED


@dataclass(frozen=True)
class Measured:
    """An evaluation's result."""

    loss: float
    """Nats a token that was to be predicted."""
    accuracy: float | None = None
    """Share of these tokens whose most probable one was right; None where it is not measured."""
    accuracy_by: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same for each value of each axis of difficulty."""


class Score:
    """Counts batch by batch."""

    def __init__(self) -> None:
        self._loss, self._asked = 0.0, 0
        self._answers: dict[tuple[str, str], list[int]] = {}
        """Right answers and all, by axis and value."""
        self._right: int | None = None

    def add(self, loss: float, asked: int) -> None:
        """Count a batch by its summed loss.

        Args:
            loss: nats, summed.
            asked: tokens that were to be predicted.
        """
        self._loss += loss
        self._asked += asked

    def add_answers(
        self,
        loss: float,
        predicted: Int[Tensor, " M"],
        targets: Int[Tensor, "B T"],
        slices: Mapping[str, Sequence[str]],
    ) -> None:
        """Count a batch by its answers too.

        Args:
            loss: nats, summed.
            predicted: the most probable token at each place that is asked, row by row.
            targets: the right ones, `IGNORED` where nothing is asked.
            slices: for every axis of difficulty the value of each row.
        """
        asked = targets != IGNORED
        right = asked.clone()
        right[asked] = predicted == targets[asked]
        self.add(loss, len(predicted))
        self._right = (self._right or 0) + int(right.sum())
        counts = list(zip(right.sum(1).tolist(), asked.sum(1).tolist(), strict=True))
        for axis, values in slices.items():
            for value, (good, all_) in zip(values, counts, strict=True):
                count = self._answers.setdefault((axis, value), [0, 0])
                count[0] += good
                count[1] += all_

    @property
    def counts(self) -> dict[str, Any]:
        """What was counted, as JSON holds it."""
        answers = [[axis, value, *counts] for (axis, value), counts in self._answers.items()]
        return {"loss": self._loss, "asked": self._asked, "right": self._right, "answers": answers}

    @classmethod
    def merged(cls, all_counts: Sequence[Mapping[str, Any]]) -> "Score":
        """What several have counted of different batches."""
        score = cls()
        for counts in all_counts:
            score.add(counts["loss"], counts["asked"])
            if counts["right"] is not None:
                score._right = (score._right or 0) + counts["right"]
            for axis, value, right, asked in counts["answers"]:
                count = score._answers.setdefault((axis, value), [0, 0])
                count[0] += right
                count[1] += asked
        return score

    @property
    def measured(self) -> Measured:
        """What was found so far."""
        asked = max(self._asked, 1)
        by: dict[str, dict[str, float]] = {}
        for (axis, value), (right, all_) in self._answers.items():
            by.setdefault(axis, {})[value] = right / max(all_, 1)
        return Measured(self._loss / asked, None if self._right is None else self._right / asked, by)
