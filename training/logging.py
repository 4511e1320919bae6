"""Logging: one JSON line per measurement in metrics.jsonl, and TensorBoard's files on request."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..registry import SeqmixError

METRICS_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "tensorboard"


class Metrics:
    """Writes the metrics of a run."""

    def __init__(self, run: Path, *, tensorboard: bool = False) -> None:
        self.file = run / METRICS_FILE
        self._open_board, self._board = _summary_writer() if tensorboard else None, None

    def begin(self, step: int) -> None:
        """Delete metrics of steps that will run again, and invalid lines (a truncated write)."""
        lines = self.file.read_text(errors="replace").splitlines(keepends=True) if self.file.exists() else []
        partial = self.file.with_name(f".{self.file.name}.partial")
        partial.write_text("".join(line for line in lines if _step_of(line) <= step))
        partial.replace(self.file)
        if self._open_board is not None:
            self._board = self._open_board(str(self.file.with_name(TENSORBOARD_FOLDER)), purge_step=step + 1)

    def record(self, values: dict[str, Any]) -> None:
        """Append a measurement, values by name; one of them is `step`."""
        with self.file.open("a") as file:
            file.write(json.dumps(values) + "\n")
        if self._board is not None:
            for name, value in _scalars(values):
                self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Flush and close."""
        if self._board is not None:
            self._board.close()


def _summary_writer() -> Callable[..., Any]:
    """TensorBoard's writer."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SeqmixError(
            "training.tensorboard needs the package tensorboard, which is not installed: "
            "pip install 'seqmix[tensorboard]'"
        ) from error
    return SummaryWriter


def _scalars(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a measurement by path, without booleans."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            yield f"{prefix}{name}", value


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinite for an invalid line."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
    return step if isinstance(step, int) and line.endswith("\n") else math.inf
