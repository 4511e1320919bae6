"""The learning-rate schedule."""

import math

from ..registry import import_object
from .config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The learning rate of a step, counted from 0."""
    if ":" in config.schedule:
        return config.learning_rate * import_object(config.schedule, "the schedule")(step, config)
    warmup, decay = config.phases
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    falling = decay if config.schedule == "wsd" else config.steps - warmup
    passed = max(step - (config.steps - falling), 0) / max(falling, 1)
    left = (1 + math.cos(math.pi * passed)) / 2 if config.schedule == "cosine" else 1 - passed
    return config.learning_rate * (config.final_lr_ratio + (1 - config.final_lr_ratio) * left)
