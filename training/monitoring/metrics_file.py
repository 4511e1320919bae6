"""Logging: one JSON line per measurement in metrics.jsonl, and the loggers of the configuration."""

import json
import math
from pathlib import Path
from typing import Any

from ...registry import write_file
from ..config import RunConfig
from .loggers import GuardedLogger, scalars

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writer of a run's metrics, to metrics.jsonl and to the loggers of the configuration.

    Raises:
        SeqmixError: a logger is not available.
    """

    def __init__(self, run: Path, config: RunConfig) -> None:
        self.run = run
        self.config = config
        self.file = run / METRICS_FILE
        self._loggers = [GuardedLogger(name) for name in config.training.loggers]
        self._started = list[GuardedLogger]()

    def begin(self, step: int) -> None:
        """Start to record a run of which `step` steps are completed: 0 for a new run.

        Lines of later steps, which will run again, are deleted, and so are invalid lines (truncated writes).
        """
        lines = self.file.read_text(errors="replace").splitlines(keepends=True) if self.file.exists() else []
        write_file("".join(line for line in lines if _step_of(line) <= step), self.file)
        try:
            for logger in self._loggers:
                logger.begin(self.run, self.config, step)
                self._started.append(logger)
        except BaseException:
            self.close()  # closes the loggers that have started
            raise

    def record(self, values: dict[str, Any]) -> None:
        """Append a line with `values`, which include `step`, to metrics.jsonl, and pass its numbers to the loggers."""
        with self.file.open("a") as file:
            file.write(json.dumps(values) + "\n")
        for logger in self._started:
            logger.record(values["step"], dict(scalars(values)))

    def close(self) -> None:
        """Close all loggers."""
        for logger in self._started:
            logger.close()


def _step_of(line: str) -> float:
    """Return the step of a line of metrics; infinity for an invalid line."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if isinstance(step, int) and line.endswith("\n") else math.inf
