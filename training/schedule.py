"""The learning-rate schedule."""

import math

from ..registry import import_object
from .config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of a step, counted from 0."""
    if ":" in config.schedule:
        return config.learning_rate * import_object(config.schedule, "the schedule")(step, config)
    warmup, decay = config.phases
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    decay_length = decay if config.schedule == "wsd" else config.steps - warmup
    progress = max(step - (config.steps - decay_length), 0) / max(decay_length, 1)
    factor = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.learning_rate * (config.final_lr_ratio + (1 - config.final_lr_ratio) * factor)
