"""The figures of runs at hand, from what they have written so far."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..registry import ConfigError, SeqmixError, nearest, read_mapping
from ..training import PRESETS
from ..training.checkpoint.run_dir import CONFIG_FILE
from ..training.monitoring.logging import METRICS_FILE
from .figures.figure import ACCURACY, LOSS, Axis, Figure, Point, Series, drawable
from .measurements import Measurement, add_time, read_measurements


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
    """Read what a run has measured, also one that still trains or was killed; its series are called `name`.

    Raises:
        SeqmixError: it is not a run directory, or has measured nothing yet.
    """
    try:
        lines = read_measurements(run)
    except OSError as error:
        raise SeqmixError(f"{run} is not a run: {_missing(run, error)}") from error
    if not lines:
        raise SeqmixError(f"{run} has no measurement in {METRICS_FILE} yet: try again after its first steps")
    if (tokens := _tokens_per_step(run / CONFIG_FILE)) is not None:
        add_time(lines, tokens)
    evaluations = [line for line in lines if "validation_loss" in line]
    return Curves(name, [line for line in lines if "validation_loss" not in line], evaluations)


def _missing(run: Path, error: OSError) -> str:
    if run.exists():
        why = "it is a file" if run.is_file() else f"it holds no {METRICS_FILE}"
        return f"{why}; a run is a folder that `seqmix train` wrote"
    siblings = [path.name for path in run.parent.iterdir()] if run.parent.is_dir() else []
    return f"it does not exist{nearest(run.name, siblings)}" if isinstance(error, FileNotFoundError) else str(error)


def _tokens_per_step(config: Path) -> int | None:
    """From the run's own configuration, in which every field stands; None where it has no such fields."""
    try:
        found = read_mapping(config, PRESETS)
        tokens = found["training"]["batch_size"] * found["data"]["sequence_length"]
        return tokens if isinstance(tokens, int) else None  # a text times a number is a text
    except (ConfigError, KeyError, TypeError):
        return None


def figures_of(runs: Sequence[Curves]) -> list[Figure]:
    """Loss over tokens and over time, accuracy, learning rate, gradient norm, throughput and memory."""
    known = all("tokens" in line for run in runs for line in (*run.steps, *run.evaluations))
    across = "tokens" if known else "step"
    over = Axis("tokens" if known else "steps", log=False)

    def losses(across: str) -> list[Series]:
        found = []
        for i, run in enumerate(runs):
            found.append(_series(run.name, i, run.steps, across, "loss", faint=bool(run.evaluations)))
            found.append(_series(run.name, i, run.evaluations, across, "validation_loss"))
        return found

    def each(name: str, title: str, caption: str, y: Axis, key: str, smooth: bool = False) -> Figure:
        found = [
            _series(run.name, i, run.evaluations if key == "accuracy" else run.steps, across, key)
            for i, run in enumerate(runs)
        ]
        return Figure(name, title, caption, over, y, found, smooth=smooth)

    faint = "Faint: training batches, as logged. With markers: the evaluations."
    shared = f"{faint} Time is that of training steps; what else ran on the machine is in it."
    rate = Axis("learning rate", zero=True, log=False)
    speed = Axis("tokens per second", zero=True, log=False)
    memory = Axis("peak memory", unit="bytes", zero=True, log=False)
    norm = Axis("gradient norm")
    time = Axis("time of training steps", unit="seconds", log=False)
    return drawable(
        [
            Figure("loss", "Loss", faint, over, LOSS, losses(across), smooth=True),
            Figure("loss-time", "Loss over time", shared, time, LOSS, losses("seconds"), smooth=True),
            each("accuracy", "Accuracy", "The share of target tokens that are right.", ACCURACY, "accuracy"),
            each("learning-rate", "Learning rate", "As the schedule sets it.", rate, "learning_rate"),
            each("gradient-norm", "Gradient norm", "Before clipping.", norm, "gradient_norm", smooth=True),
            each("throughput", "Throughput", "Of the logged steps.", speed, "tokens_per_second", smooth=True),
            each("memory", "Peak memory", "The most that was allocated so far.", memory, "memory_bytes"),
        ]
    )


def _series(
    name: str, style: int, found: Sequence[Measurement], across: str, key: str, *, faint: bool = False
) -> Series:
    points = [Point(_number(line.get(across)), _number(line.get(key))) for line in found]
    return Series(name, points, style, faint)


def _number(value: Any) -> float:
    """A measured number; anything else is not drawn."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
