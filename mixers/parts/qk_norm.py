"""RMS norm of queries and keys, with weights."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..base.roles import Role, Roles


class QKNorm(nn.Module):
    """RMS norms of queries and keys, each with its own weights.

    Args:
        n_heads: number of query heads, and number of key heads; 0 for queries alone.
        width: width of a head.
        eps: added to the mean square.
        all_heads: True to take the mean over all heads, each with its own weights; False to take it per head, with
            weights that all heads share.
        zero_centered: True if the factor is 1 + weight.
    """

    parameter_roles: ClassVar[Roles] = {"q_weight": Role.NORM, "k_weight": Role.NORM}

    def __init__(
        self, n_heads: tuple[int, int], width: int, eps: float, *, all_heads: bool = False, zero_centered: bool = False
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.eps = eps
        self.all_heads = all_heads
        self.zero_centered = zero_centered
        shapes = [(n, width) if all_heads else (width,) for n in n_heads]
        self.q_weight = nn.Parameter(torch.empty(shapes[0]))
        self.k_weight = nn.Parameter(torch.empty(shapes[1])) if n_heads[1] else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise weights so that every factor is 1."""
        for weight in self.parameters():
            nn.init.constant_(weight, 0.0 if self.zero_centered else 1.0)

    def forward(self, qk: Float[Tensor, "B T H+G K"]) -> Float[Tensor, "B T H+G K"]:
        """Norm queries and keys, which are concatenated along the heads."""
        factor = self.q_weight.expand(self.n_heads[0], -1)
        if self.k_weight is not None:
            factor = torch.cat((factor, self.k_weight.expand(self.n_heads[1], -1)))
        factor = factor + (1 if self.zero_centered else 0)
        if not self.all_heads:
            return (F.rms_norm(qk, qk.shape[-1:], eps=self.eps) * factor).to(qk.dtype)
        parts = qk.split([n for n in self.n_heads if n], dim=-2)
        normed = [F.rms_norm(x, x.shape[-2:], eps=self.eps) for x in parts]
        return (torch.cat(normed, dim=-2) * factor).to(qk.dtype)
