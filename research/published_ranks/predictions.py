"""Predictions that were written down before anything was measured: predictions.yaml."""

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ...registry import Config, load
from .grids import FOLDER, Subject

FILE = "predictions.yaml"
DATE = "date"
"""Predictor that needs no measurement: newer mixers rank higher."""


class Prediction(Config):
    """Expected relation of a predictor to a subject of the grids."""

    predictor: str
    """Group of tasks."""
    asks: Subject
    """Subject of the published columns."""
    expect: Literal["positive", "none", "no better than date"]
    because: str


class Predictions(Config):
    """Groups of tasks, and the predictions."""

    groups: dict[str, tuple[str, ...]]
    """Tasks of the suite by group; the predictor is the mean of their z-scores."""
    predictions: tuple[Prediction, ...] = Field(min_length=1)

    @property
    def tested(self) -> int:
        """Number of predictions that have a p-value, for which all of them are corrected."""
        return sum(prediction.expect == "positive" for prediction in self.predictions)

    @model_validator(mode="after")
    def _check_predictors(self) -> "Predictions":
        for prediction in self.predictions:
            if prediction.predictor not in self.groups:
                raise ValueError(
                    f"predictions: expected one of the groups {', '.join(self.groups)}, got {prediction.predictor!r}"
                )
        return self


@cache
def load_predictions(folder: Path = FOLDER) -> Predictions:
    """Load the groups and predictions."""
    return load(Predictions, folder / FILE, presets=folder)
