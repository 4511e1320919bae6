"""The norm of queries and keys: each head's by its root mean square, times weights that all heads share."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class QKNorm(nn.Module):
    """RMS norms of queries and of keys over the width of a head.

    Args:
        n_heads: heads of queries, and of keys.
        width: of a head.
        eps: added to the mean square.
    """

    def __init__(self, n_heads: tuple[int, int], width: int, eps: float) -> None:
        super().__init__()
        self.n_heads, self.eps = n_heads, eps
        self.q_weight, self.k_weight = (nn.Parameter(torch.empty(width)) for _ in "qk")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of 1."""
        nn.init.ones_(self.q_weight)
        nn.init.ones_(self.k_weight)

    def forward(self, qk: Float[Tensor, "B T H+G K"]) -> Float[Tensor, "B T H+G K"]:
        """Queries, then keys, normed."""
        weights = (w.expand(n, -1) for w, n in zip((self.q_weight, self.k_weight), self.n_heads, strict=True))
        return (F.rms_norm(qk, qk.shape[-1:], eps=self.eps) * torch.cat(tuple(weights))).to(qk.dtype)
