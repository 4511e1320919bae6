"""Measurements of a run: its metrics.jsonl, even if the run still trains, was killed, or has damaged lines."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ...registry import read_bytes
from .metrics_file import METRICS_FILE

Measurement = dict[str, Any]
"""Values of one line: the step, and the measurements at that step."""


def read_measurements(run: Path) -> list[Measurement]:
    """Read the measurements in a run's folder; truncated or damaged lines are skipped.

    Raises:
        OSError: the file cannot be read.
    """
    measurements = []
    for line in read_bytes(run / METRICS_FILE).decode(errors="replace").splitlines():
        try:
            values = json.loads(line, parse_int=_integer)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            measurements.append(values)
    return measurements


def _integer(digits: str) -> float:
    """Parse an integer; one that may exceed 64 bits becomes a float (inf beyond its range, which is not drawn)."""
    return int(digits) if len(digits) < 19 else float(digits)


def add_time(lines: list[Measurement], tokens_per_step: int) -> None:
    """Add to each line the tokens and seconds of training so far.

    Steps between two logged ones are assumed to be as fast as the later one.
    """
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
