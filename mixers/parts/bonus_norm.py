"""The norm of RWKV's outputs per head, and its bonus: a token reads its own value again (arXiv 2503.14456, §4.1)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class BonusNorm(nn.Module):
    """GroupNorm(o) * weight + bias + (sum_K bonus * q * k) v, with one group, and vectors, per head; weights begin as
    `start`, and eps times the width is added to the variance."""

    def __init__(self, n_heads: int, width: int, eps: float, start: float) -> None:
        super().__init__()
        self.eps = width * eps
        self.start = start
        self.weight, self.bias, self.bonus = (nn.Parameter(torch.empty(n_heads, width)) for _ in range(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As RWKV-7's authors."""
        for parameter, number in ((self.weight, self.start), (self.bias, 0.0), (self.bonus, -0.04)):
            nn.init.constant_(parameter, number)

    def forward(
        self, o: Float[Tensor, "B T H K"], q: Float[Tensor, "B T H K"], k: Float[Tensor, "B T H K"], v: Tensor
    ) -> Float[Tensor, "B T H K"]:
        """In the dtype of v, of sums in float32 or float64."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        o = F.layer_norm(o.to(wide), o.shape[-1:], eps=self.eps) * self.weight.to(wide) + self.bias.to(wide)
        return (o + (self.bonus.to(wide) * q * k).sum(-1, keepdim=True) * v).to(v.dtype)
