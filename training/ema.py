"""An exponential moving average of the parameters, which evaluates better than they do while the learning rate is high.

The decay of an early step is (1 + step) / (10 + step) at most, so that the initial parameters do not linger.
"""

import torch
from torch import Tensor, nn


class Ema:
    """The average, with a decay per step in (0, 1); it begins as the model's parameters, and each process has its own
    shards."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the parameters after a step, counted from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            self.parameters[name].lerp_(parameter, weight)
