"""RWKV's output norms per head: RWKV-6's, and RWKV-7's with its bonus, by which a token reads its own value again
(arXiv 2404.05892; 2503.14456, §4.1)."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..base.roles import Role, Roles


class GroupNorm(nn.Module):
    """Output norm of RWKV-6, GroupNorm(o) * weight + bias, with one group per head.

    Args:
        n_heads: number of heads, each with its own weights and biases.
        width: width of a head.
        eps: constant that is multiplied by `width` and added to the variance.
        start: initial value of all weights.
    """

    parameter_roles: ClassVar[Roles] = {"weight": Role.NORM, "bias": Role.NORM}

    def __init__(self, n_heads: int, width: int, eps: float, start: float = 1.0) -> None:
        super().__init__()
        self.eps = width * eps
        self.start = start
        self.weight, self.bias = (nn.Parameter(torch.empty(n_heads, width)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights as `start`, and the biases as 0."""
        nn.init.constant_(self.weight, self.start)
        nn.init.zeros_(self.bias)

    def forward(self, o: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H K"]:
        """Return the normed output, float32 or float64."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return F.layer_norm(o.to(wide), o.shape[-1:], eps=self.eps) * self.weight.to(wide) + self.bias.to(wide)


class BonusNorm(GroupNorm):
    """Output norm of RWKV-7, GroupNorm(o) * weight + bias + (sum_K bonus * q * k) v, per head."""

    parameter_roles: ClassVar[Roles] = {**GroupNorm.parameter_roles, "bonus": Role.VECTOR}

    def __init__(self, n_heads: int, width: int, eps: float, start: float) -> None:
        super().__init__(n_heads, width, eps, start)
        self.bonus = nn.Parameter(torch.empty(n_heads, width))
        nn.init.constant_(self.bonus, -0.04)

    def reset_parameters(self) -> None:
        """Initialise as the RWKV-7 authors' code."""
        super().reset_parameters()
        if hasattr(self, "bonus"):  # not while the base class is built
            nn.init.constant_(self.bonus, -0.04)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] more inputs
        self, o: Float[Tensor, "B T H K"], q: Float[Tensor, "B T H K"], k: Float[Tensor, "B T H K"], v: Tensor
    ) -> Float[Tensor, "B T H K"]:
        """Return the normed output in the dtype of v; the computation is in float32 or float64."""
        o = super().forward(o)
        return (o + (self.bonus.to(o.dtype) * q * k).sum(-1, keepdim=True) * v).to(v.dtype)
