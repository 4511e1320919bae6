"""Feed-forward networks: the base class, and one file per kind."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ...registry import Config, Registry

HiddenMap = Callable[[Tensor], Tensor]
"""Map of the hidden layer of a network before the activation, [B T C] to [B T C]."""
Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "relu2"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
"""Activation functions by name; `relu2` is the squared ReLU (Primer, arXiv 2109.08668)."""


class FfnConfig(Config, ABC):
    """Configuration of a feed-forward network; a subclass declares `kind: Literal["its_name"]`."""

    kind: Any
    """Name under which the network is registered; a `Literal` in every subclass."""
    expansion: float = Field(gt=0, le=1000)
    """Hidden width divided by d_model; the hidden width is rounded to a whole number."""
    multiple_of: int = Field(default=1, gt=0)
    """The hidden width is rounded up to a multiple of this number."""

    @abstractmethod
    def build(self, d_model: int) -> "FeedForward":
        """Build the module for a residual stream of width `d_model`."""

    def hidden_width(self, d_model: int) -> int:
        """Return the hidden width for a residual stream of width `d_model`, at least 1."""
        return -(-max(round(self.expansion * d_model), 1) // self.multiple_of) * self.multiple_of


class FeedForward(nn.Module, ABC):
    """A feed-forward network: a map that is applied to every token independently."""

    hidden_channels: int | None = None
    """Number of channels before the activation, to which `forward` applies `hidden`; None if it takes no `hidden`."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Apply the network to every token.

        If `hidden_channels` is set, a second argument `hidden` maps the hidden layer [B T C] before the activation.
        """

    def reset_parameters(self) -> None:
        """Initialise every parameter: linear layers by torch's default, as in the code of the RetNet authors."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def balance(self, total: Callable[[Tensor], Tensor]) -> float | None:
        """Balance the load of a mixture of experts after an optimizer step; other networks do nothing.

        Args:
            total: sums a tensor over all processes.

        Returns:
            The largest load of an expert divided by the mean load, minus 1 (MaxVio of arXiv 2408.15664); None for a
            network without experts.
        """
        del total
        return None

    def flops(self, length: int) -> int:
        """Return the FLOPs of the matrix products in the forward pass over `length` tokens."""
        return 2 * length * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))


FFNS = Registry("ffn", FfnConfig, package="seqmix.blocks.ffn")
"""Registry of feed-forward networks: the files of this folder, and classes named by dotted path."""
