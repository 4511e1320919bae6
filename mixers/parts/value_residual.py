"""The values of a model's first layer, mixed into those of a later one (Zhou et al., arXiv 2410.17897)."""

import torch
from jaxtyping import Float
from torch import Tensor

from .gates import LowRank


class ValueResidual(LowRank):
    """v + nu * (v^1 - v) by channel, with nu = sigmoid(x W_1 W_2 + b) of a map of some rank, as RWKV-7 has it."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__(width, rank, width, bias=True)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Shares of 0.72 to 0.63 of the first layer, falling by channel, which x changes at random."""
        super().reset_parameters()
        bias = self.up.bias
        bias.copy_(torch.linspace(0.93, 0.53, len(bias), device=bias.device, dtype=torch.float64))

    def mixed(
        self, v: Float[Tensor, "B T C"], first: Float[Tensor, "B T C"] | None, x: Float[Tensor, "B T C"]
    ) -> Float[Tensor, "B T C"]:
        """v with its share of the first layer's values."""
        assert first is not None
        return v.lerp(first.to(v.dtype), self(x).sigmoid())
