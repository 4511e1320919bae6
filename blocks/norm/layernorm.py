"""Layer normalisation (arXiv 1607.06450): the RetNet paper's norm."""

from typing import Literal

from pydantic import Field
from torch import nn

from . import NormConfig


class LayerNormConfig(NormConfig):
    """Mean 0, variance 1, times a weight, and plus a bias if wanted."""

    kind: Literal["layernorm"] = "layernorm"
    eps: float = Field(default=1e-5, ge=0)
    """Added to the variance."""
    bias: bool = False
    """Whether there is a bias."""

    def build(self, d_model: int) -> nn.LayerNorm:
        """Build the norm."""
        return nn.LayerNorm(d_model, eps=self.eps, bias=self.bias)
