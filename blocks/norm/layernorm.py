"""Layer normalisation (arXiv 1607.06450), the norm of the RetNet paper."""

from typing import Literal

from pydantic import Field
from torch import nn

from . import NormConfig


class LayerNormConfig(NormConfig):
    """Configuration of layer normalisation: mean 0 and variance 1, times a weight, plus an optional bias."""

    kind: Literal["layernorm"] = "layernorm"
    eps: float = Field(default=1e-5, ge=0)
    """Constant added to the variance."""
    bias: bool = False
    """True to add a learned bias after the weight."""

    def build(self, d_model: int) -> nn.LayerNorm:
        """Build the norm."""
        return nn.LayerNorm(d_model, eps=self.eps, bias=self.bias)
