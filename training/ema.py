"""An exponential moving average of the parameters. While the learning rate is high, it evaluates better than they do.

The decay of an early step is at most (1 + step) / (10 + step), so that the initial parameters do not linger.
"""

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average of a model's parameters, initialised with them; each process averages its own shards.

    Args:
        model: the model.
        decay: decay per step, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average with the parameters after a step; steps are counted from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            self.parameters[name].lerp_(parameter, weight)
