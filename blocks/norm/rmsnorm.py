"""Root-mean-square normalisation (arXiv 1910.07467)."""

from typing import Literal

from pydantic import Field
from torch import nn

from . import NormConfig


class RmsNormConfig(NormConfig):
    """Mean square 1, times a weight."""

    kind: Literal["rmsnorm"] = "rmsnorm"
    eps: float = Field(default=1e-6, ge=0)
    """Added to the mean square."""

    def build(self, d_model: int) -> nn.RMSNorm:
        """Build the norm."""
        return nn.RMSNorm(d_model, eps=self.eps)
