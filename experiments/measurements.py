"""What a run has measured: its metrics.jsonl, also of one that still trains, was killed, or has damaged lines."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..registry import read_bytes
from ..training.monitoring.logging import METRICS_FILE

Measurement = dict[str, Any]
"""A line: its step, and what was measured there."""


def read_measurements(run: Path) -> list[Measurement]:
    """The lines of a run's folder, without those that are cut short or damaged.

    Raises:
        OSError: there is no such file.
    """
    found = []
    for line in read_bytes(run / METRICS_FILE).decode(errors="replace").splitlines():
        try:
            values = json.loads(line, parse_int=_integer)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append(values)
    return found


def _integer(digits: str) -> float:
    """An integer, or a float where 64 bits do not hold it: infinite beyond a float's range, and so not drawn."""
    return int(digits) if len(digits) < 19 else float(digits)


def add_time(lines: list[Measurement], tokens_per_step: int) -> None:
    """Add to each line its tokens and seconds of training so far; a step is as fast as the next one that was logged."""
    steps = [0]
    seconds = [0.0]
    pace = 0.0
    for line in lines:
        speed = line.get("tokens_per_second")
        if isinstance(speed, int | float) and speed > 0:
            pace = tokens_per_step / speed
            seconds.append(seconds[-1] + (line["step"] - steps[-1]) * pace)
            steps.append(line["step"])
    for line in lines:
        unlogged = max(line["step"] - steps[-1], 0)
        line["tokens"] = line["step"] * tokens_per_step
        line["seconds"] = float(np.interp(line["step"], steps, seconds)) + unlogged * pace
