"""The optimizer and its learning rate."""

import math

import torch
from torch import nn

from .config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors do not; every parameter is in one group."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas, fused=True
    )


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The learning rate of a step, counted from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    passed = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    left = 1 - passed if config.schedule == "linear" else (1 + math.cos(math.pi * passed)) / 2
    return config.learning_rate * (config.final_lr_ratio + (1 - config.final_lr_ratio) * left)
