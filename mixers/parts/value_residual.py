"""Value residual: values of the first layer mixed into those of a later layer (Zhou et al., arXiv 2410.17897)."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..base.roles import Role
from .gates import LowRank


class ValueResidual(LowRank):
    """Mixture of a layer's values v with the first layer's values v^1, v + nu * (v^1 - v) by channel, as in RWKV-7.

    nu = sigmoid(x W_1 W_2 + b), with a low-rank W_1 W_2.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__(width, rank, width, bias=True, role=Role.GATE)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise nu, the share of the first values, from about 0.72 in the first channel to 0.63 in the last."""
        super().reset_parameters()
        bias = self.up.bias
        bias.copy_(torch.linspace(0.93, 0.53, len(bias), device=bias.device, dtype=torch.float64))

    def mix_in(
        self, v: Float[Tensor, "B T C"], first: Float[Tensor, "B T C"] | None, x: Float[Tensor, "B T C"]
    ) -> Float[Tensor, "B T C"]:
        """Return v mixed with the values of the first layer."""
        assert first is not None
        return v.lerp(first.to(v.dtype), self(x).sigmoid())
