"""Root-mean-square normalisation (arXiv 1910.07467)."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from . import NormConfig


class RmsNormConfig(NormConfig):
    """Configuration of RMS normalisation: mean square 1, times a weight."""

    kind: Literal["rmsnorm"] = "rmsnorm"
    eps: float = Field(default=1e-6, ge=0)
    """Constant added to the mean square."""
    zero_centered: bool = False
    """True to multiply by 1 + weight, so that weight decay pulls the factor to 1 (Gemma, Qwen3-Next)."""

    def build(self, d_model: int) -> nn.RMSNorm:
        """Build the norm."""
        return ZeroCenteredRMSNorm(d_model, eps=self.eps) if self.zero_centered else nn.RMSNorm(d_model, eps=self.eps)


class ZeroCenteredRMSNorm(nn.RMSNorm):
    """RMS normalisation that multiplies by 1 + weight, where the weight starts at 0."""

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Normalise every token."""
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)

    def reset_parameters(self) -> None:
        """Set the weights to 0, which makes the factor 1."""
        nn.init.zeros_(self.weight)
