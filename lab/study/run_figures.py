"""The figures of runs, from the measurements that they have written so far."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...registry import ConfigError, DataError, nearest_hint, read_mapping
from ...training import PRESETS
from ...training.checkpoint.run_dir import CONFIG_FILE
from ...training.monitoring.measurements import Measurement, add_time, read_measurements
from ...training.monitoring.metrics_file import METRICS_FILE
from ..figures.figure import ACCURACY, LOSS, Axis, Figure, Point, Series, drawable


@dataclass(frozen=True)
class Curves:
    """Measurements of one run."""

    name: str
    steps: list[Measurement]
    """Measurements of logged optimizer steps, in order."""
    evaluations: list[Measurement]

    @property
    def last_step(self) -> int:
        """Last step with a measurement."""
        return max(line["step"] for line in (*self.steps, *self.evaluations))


def read_curves(run: Path, name: str) -> Curves:
    """Read the measurements of a run, finished or not; its series in figures are called `name`.

    Raises:
        SeqmixError: it is not a run directory, or has no measurements yet.
    """
    try:
        lines = read_measurements(run)
    except OSError as error:
        raise DataError(f"{run} is not a run directory: {_reason(run, error)}") from error
    if not lines:
        raise DataError(f"{run} has no measurement in {METRICS_FILE} yet: try again after its first steps")
    if (tokens := _tokens_per_step(run / CONFIG_FILE)) is not None:
        add_time(lines, tokens)
    evaluations = [line for line in lines if "validation_loss" in line]
    return Curves(name, [line for line in lines if "validation_loss" not in line], evaluations)


def _reason(run: Path, error: OSError) -> str:
    if run.exists():
        reason = "it is a file" if run.is_file() else f"it has no {METRICS_FILE}"
        return f"{reason}; give a folder that `seqmix train` wrote"
    siblings = [path.name for path in run.parent.iterdir()] if run.parent.is_dir() else []
    return (
        f"it does not exist{nearest_hint(run.name, siblings)}" if isinstance(error, FileNotFoundError) else str(error)
    )


def _tokens_per_step(config: Path) -> int | None:
    """Compute the tokens per step from a run's configuration file; None if the file lacks the fields."""
    try:
        fields = read_mapping(config, PRESETS)
        tokens = fields["training"]["batch_size"] * fields["data"]["sequence_length"]
        return tokens if isinstance(tokens, int) else None  # a string times an integer would be a string
    except (ConfigError, KeyError, TypeError):
        return None


def figures_of(runs: Sequence[Curves]) -> list[Figure]:
    """Return the figures of runs: loss over tokens and time, accuracy, learning rate, gradient norm, speed and memory.

    If the tokens per step of any run are unknown, the figures' x axis counts steps instead of tokens.
    """
    has_tokens = all("tokens" in line for run in runs for line in (*run.steps, *run.evaluations))
    x_key = "tokens" if has_tokens else "step"
    x_axis = Axis("tokens" if has_tokens else "steps", log=False)

    def losses(x_key: str) -> list[Series]:
        series = []
        for i, run in enumerate(runs):
            series.append(_series(run.name, i, run.steps, x_key, "loss", faint=bool(run.evaluations)))
            series.append(_series(run.name, i, run.evaluations, x_key, "validation_loss"))
        return series

    def each(name: str, title: str, caption: str, y: Axis, key: str, smooth: bool = False) -> Figure:
        series = [
            _series(run.name, i, run.evaluations if key == "accuracy" else run.steps, x_key, key)
            for i, run in enumerate(runs)
        ]
        return Figure(name, title, caption, x_axis, y, series, smooth=smooth)

    faint = "Faint lines: training batches, as logged. Lines with markers: evaluations."
    over_time = (
        f"{faint} Time is estimated from the speed of the logged steps, without evaluations; other load lengthens it."
    )
    rate_axis = Axis("learning rate", from_zero=True, log=False)
    speed_axis = Axis("tokens per second", from_zero=True, log=False)
    memory_axis = Axis("peak memory", unit="bytes", from_zero=True, log=False)
    norm_axis = Axis("gradient norm")
    time_axis = Axis("time of training steps", unit="seconds", log=False)
    return drawable(
        [
            Figure("loss", "Loss", faint, x_axis, LOSS, losses(x_key), smooth=True),
            Figure("loss-time", "Loss over time", over_time, time_axis, LOSS, losses("seconds"), smooth=True),
            each("accuracy", "Accuracy", "Share of answer tokens predicted correctly.", ACCURACY, "accuracy"),
            each("learning-rate", "Learning rate", "Learning rate of the schedule.", rate_axis, "learning_rate"),
            each("gradient-norm", "Gradient norm", "Norm before clipping.", norm_axis, "gradient_norm", smooth=True),
            each(
                "throughput", "Throughput", "Speed of the logged steps.", speed_axis, "tokens_per_second", smooth=True
            ),
            each("memory", "Peak memory", "Largest memory allocated so far.", memory_axis, "memory_bytes"),
        ]
    )


def _series(
    name: str, style: int, lines: Sequence[Measurement], x_key: str, key: str, *, faint: bool = False
) -> Series:
    points = [Point(_number(line.get(x_key)), _number(line.get(key))) for line in lines]
    return Series(name, points, style, faint)


def _number(value: Any) -> float:
    """Return a number as it is, and NaN, which is not drawn, for anything else."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
