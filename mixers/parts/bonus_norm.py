"""RWKV's output norm per head with its bonus, by which a token reads its own value again (arXiv 2503.14456, §4.1)."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..roles import Role, Roles


class BonusNorm(nn.Module):
    """Output norm of RWKV-7, GroupNorm(o) * weight + bias + (sum_K bonus * q * k) v, per head.

    Args:
        n_heads: number of heads; each is one group, with its own weight, bias and bonus.
        width: width of a head.
        eps: constant that is multiplied by `width` and added to the variance.
        start: initial value of all weights.
    """

    parameter_roles: ClassVar[Roles] = {"weight": Role.NORM, "bias": Role.NORM, "bonus": Role.VECTOR}

    def __init__(self, n_heads: int, width: int, eps: float, start: float) -> None:
        super().__init__()
        self.eps = width * eps
        self.start = start
        self.weight, self.bias, self.bonus = (nn.Parameter(torch.empty(n_heads, width)) for _ in range(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the RWKV-7 authors' code."""
        for parameter, number in ((self.weight, self.start), (self.bias, 0.0), (self.bonus, -0.04)):
            nn.init.constant_(parameter, number)

    def forward(
        self, o: Float[Tensor, "B T H K"], q: Float[Tensor, "B T H K"], k: Float[Tensor, "B T H K"], v: Tensor
    ) -> Float[Tensor, "B T H K"]:
        """Return the normed output in the dtype of v; the computation is in float32 or float64."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        o = F.layer_norm(o.to(wide), o.shape[-1:], eps=self.eps) * self.weight.to(wide) + self.bias.to(wide)
        return (o + (self.bonus.to(wide) * q * k).sum(-1, keepdim=True) * v).to(v.dtype)
