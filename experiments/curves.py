"""The curves of runs at hand, from what they have written so far."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..registry import ConfigError, SeqmixError, nearest, read_mapping
from ..training import PRESETS
from ..training.logging import METRICS_FILE
from ..training.run_dir import CONFIG_FILE
from .chart import ACCURACY, LOSS, Axis, Chart, Line

Measurement = dict[str, Any]
"""A line of metrics.jsonl, and beside its step the tokens and the seconds of training up to there, where known."""


@dataclass(frozen=True)
class Curves:
    """What a run has measured."""

    name: str
    steps: list[Measurement]
    """Optimizer steps, in order."""
    evaluations: list[Measurement]

    @property
    def last_step(self) -> int:
        """Steps made, as far as they are logged."""
        return max(line["step"] for line in (*self.steps, *self.evaluations))


def read_curves(run: Path, name: str) -> Curves:
    """Read what a run has measured, also one that still trains or was killed: a line cut short is none.

    Args:
        run: the folder that `seqmix train` wrote.
        name: what its lines are called.

    Raises:
        SeqmixError: it is no run, or has measured nothing yet.
    """
    try:
        text = (run / METRICS_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise SeqmixError(f"{run} is no run: {_missing(run, error)}") from error
    lines = [values for line in text.splitlines() if (values := _values(line)) is not None]
    if not lines:
        raise SeqmixError(f"{run} has no measurement in {METRICS_FILE} yet: try again after its first steps")
    _place(lines, _tokens_per_step(run / CONFIG_FILE))
    evaluations = [line for line in lines if "validation_loss" in line]
    return Curves(name, [line for line in lines if "validation_loss" not in line], evaluations)


def _missing(run: Path, error: OSError) -> str:
    if run.is_file():
        return "it is a file; a run is a folder that `seqmix train` wrote"
    if run.is_dir():
        return f"it holds no {METRICS_FILE}; a run is a folder that `seqmix train` wrote"
    siblings = [path.name for path in run.parent.iterdir()] if run.parent.is_dir() else []
    return f"it does not exist{nearest(run.name, siblings)}" if isinstance(error, FileNotFoundError) else str(error)


def _values(line: str) -> Measurement | None:
    """The measurement in a line; None if it is none."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def _tokens_per_step(config: Path) -> int | None:
    """From the run's own configuration, in which every field stands; None where it has no such fields."""
    try:
        found = read_mapping(config, PRESETS)
        tokens = found["training"]["batch_size"] * found["data"]["sequence_length"]
        return tokens if isinstance(tokens, int) else None  # a text times a number is a text
    except (ConfigError, KeyError, TypeError):
        return None


def _place(lines: Sequence[Measurement], tokens: int | None) -> None:
    """Add tokens and seconds: the steps between two that are logged are taken to be as quick as the later one."""
    if tokens is None:
        return
    before, seconds = 0, 0.0
    for line in lines:
        speed = line.get("tokens_per_second")
        if isinstance(speed, int | float) and speed > 0:
            seconds += (line["step"] - before) * tokens / speed
            before = line["step"]
        line |= {"tokens": line["step"] * tokens, "seconds": seconds}


def charts_of(runs: Sequence[Curves]) -> list[Chart]:
    """Loss over tokens and over time, accuracy, learning rate, gradient norm, throughput and memory."""
    known = all("tokens" in line for run in runs for line in (*run.steps, *run.evaluations))
    across = "tokens" if known else "step"
    over, time = Axis("tokens" if known else "steps"), Axis("time of training steps", unit="seconds")
    rate, norm = Axis("learning rate", zero=True, log=False), Axis("gradient norm")
    speed, memory = Axis("tokens per second", zero=True), Axis("peak memory", unit="bytes", zero=True)
    losses = "Faint: batches of training, as they are logged. With markers: the evaluations."
    charts = [
        Chart("Loss", losses, over, LOSS, _losses(runs, across)),
        Chart("Loss over time", losses, time, LOSS, _losses(runs, "seconds")),
        Chart(
            "Accuracy",
            "The share of asked tokens that are right, in evaluations.",
            over,
            ACCURACY,
            [_line(run.name, i, run.evaluations, across, "accuracy") for i, run in enumerate(runs)],
        ),
        Chart("Learning rate", "As the schedule has it.", over, rate, _of_steps(runs, across, "learning_rate")),
        Chart("Gradient norm", "Before it is clipped.", over, norm, _of_steps(runs, across, "gradient_norm")),
        Chart("Throughput", "Of the logged steps.", over, speed, _of_steps(runs, across, "tokens_per_second")),
        Chart("Memory", "The most taken so far.", over, memory, _of_steps(runs, across, "memory_bytes")),
    ]
    return [kept for chart in charts if (kept := chart.drawable()) is not None]


def _losses(runs: Sequence[Curves], across: str) -> list[Line]:
    lines = []
    for i, run in enumerate(runs):
        lines.append(_line(run.name, i, run.steps, across, "loss", faint=bool(run.evaluations)))
        lines.append(_line(run.name, i, run.evaluations, across, "validation_loss"))
    return lines


def _of_steps(runs: Sequence[Curves], across: str, key: str) -> list[Line]:
    return [_line(run.name, i, run.steps, across, key) for i, run in enumerate(runs)]


def _line(name: str, style: int, found: Sequence[Measurement], across: str, key: str, *, faint: bool = False) -> Line:
    points = [(line[across], line[key]) for line in found if _is_number(line.get(across)) and _is_number(line.get(key))]
    return Line(name, [x for x, _ in points], [y for _, y in points], style=style, faint=faint)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
