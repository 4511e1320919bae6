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

Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class FfnConfig(Config, ABC):
    """The configuration of a feed-forward network; a subclass declares `kind: Literal["its_name"]`."""

    kind: Any
    """The name it is registered under: a `Literal` in every subclass."""
    expansion: float = Field(gt=0, le=1000)
    """Hidden width over d_model, rounded to a whole number."""
    multiple_of: int = Field(default=1, gt=0)
    """The hidden width is rounded up to a multiple of this."""

    @abstractmethod
    def build(self, d_model: int) -> "FeedForward":
        """Build the module for a residual stream of width `d_model`."""

    def hidden_width(self, d_model: int) -> int:
        """Width between the two products, at least 1."""
        return -(-max(round(self.expansion * d_model), 1) // self.multiple_of) * self.multiple_of


class FeedForward(nn.Module, ABC):
    """A map applied to every token independently."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Map every token."""

    def reset_parameters(self) -> None:
        """Initialise every parameter, linear layers by torch's default, as the RetNet authors' code."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def balance(self, total: Callable[[Tensor], Tensor]) -> float | None:
        """What a network does after an optimizer step: a mixture of experts balances its load, by the sums of all
        processes.

        Returns:
            The largest load over the mean, minus 1 (arXiv 2408.15664's MaxVio); None where nothing is balanced.
        """
        del total
        return None

    def flops(self, length: int) -> int:
        """Operations of the matrix products for `length` tokens, forward."""
        return 2 * length * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))


FFNS = Registry("ffn", FfnConfig, package="seqmix.blocks.ffn")
"""All feed-forward networks: the files of this folder, and dotted paths."""
