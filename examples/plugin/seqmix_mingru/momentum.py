"""Momentum residual connections (Sander et al., arXiv 2102.07870).

    v <- gamma v + (1 - gamma) f(x)          v = 0 before the first branch
    x <- x + v                               for every branch f

gamma is learned, one number per branch. It starts at 0, where the connection is the plain one. In the paper it is a
constant.
"""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqmix.blocks import Residual, ResidualConfig, ResidualEnds

__all__ = ["Momentum", "MomentumConfig", "MomentumEnds"]

Stream = tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]
"""Stream: x and v."""


class MomentumConfig(ResidualConfig):
    """Momentum residual connections: a branch's output is added to a running mean of the earlier ones."""

    kind: Literal["momentum"] = "momentum"

    def build(self, d_model: int, *, index: int, place: int, layer: int) -> "Momentum":  # noqa: ARG002
        """Build the connection of one branch."""
        return Momentum()

    def build_ends(self, d_model: int, *, n_layers: int) -> "MomentumEnds":  # noqa: ARG002
        """Build the ends of the stream."""
        return MomentumEnds()


class Momentum(Residual):
    """The connection of one branch."""

    parameter_roles: ClassVar = {"gamma": "vector"}

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        """Start as the plain connection."""
        nn.init.zeros_(self.gamma)

    def forward(self, stream: Stream, branch: Callable[[Tensor], Tensor]) -> Stream:
        """Return the stream after a branch."""
        x, v = stream
        # under autocast, a branch may return another dtype than that of the stream
        v = torch.lerp(branch(x).to(x.dtype), v, self.gamma.to(x.dtype))
        return x + v, v


class MomentumEnds(ResidualEnds):
    """The stream starts as (x, 0), and ends as x."""

    def start(self, x: Float[Tensor, "B T D"]) -> Stream:
        """Return the stream before the first branch."""
        return x, torch.zeros_like(x)

    def forward(self, stream: Stream) -> Float[Tensor, "B T D"]:
        """Return the vectors that the final norm reads."""
        return stream[0]
