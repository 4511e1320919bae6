"""Residual scalars: every layer scales the stream and adds the normed embedding x_0.

    x <- r_l x + z_l x_0        before the first branch of layer l;  x_0 = RMSNorm(embedding), without weights
    x <- x + f(x)               for every branch f

After nanochat, which has no paper (residual and x0 "lambdas"). Differences: the stream itself starts from the
embedding, not from x_0, so that r = 1 and z = 0 are the plain connection, and the embedding's own norm is
`model.embedding_norm`. nanochat trains r with 1/100 of z's learning rate; here r = stream + rho / 100 with a trained
rho, which is the same with AdamW. Its initial values fall with depth, r from 1.15 to 1.05 and z from 0.20 to 0.05;
here all layers have the same.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ...mixers.base.roles import Role, Roles
from . import Branch, Residual, ResidualConfig, ResidualEnds

Pair = tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]
"""Stream: x and x_0."""


class ScalarsConfig(ResidualConfig):
    """Configuration of residual scalars: x = r x + z x_0 before every layer, with trained r and z."""

    kind: Literal["scalars"] = "scalars"
    stream: float = Field(default=1.0, gt=0)
    """Initial factor r of the stream in every layer."""
    embedding: float = 0.0
    """Initial factor z of the normed embedding in every layer."""
    eps: float = Field(default=1e-6, ge=0)
    """Constant added to the mean square of the embedding."""

    def build(self, d_model: int, *, index: int, place: int, layer: int) -> Residual:  # noqa: ARG002 scalars fit any width
        """Build the connection: the scalars belong to a layer's first branch."""
        return Scalars(self) if place == 0 else AfterScalars()

    def build_ends(self, d_model: int, *, n_layers: int) -> "ScalarsEnds":  # noqa: ARG002 no parameters
        """Build the ends of the stream."""
        return ScalarsEnds(self.eps)


class Scalars(Residual):
    """The connection of a layer's first branch: r x + z x_0, then the branch."""

    parameter_roles: ClassVar[Roles] = {"rho": Role.VECTOR, "z": Role.VECTOR}

    def __init__(self, config: ScalarsConfig) -> None:
        super().__init__()
        self.initial = config.stream, config.embedding
        # of one element: FSDP does not shard tensors without dimensions
        self.rho, self.z = (nn.Parameter(torch.empty(1)) for _ in range(2))

    def reset_parameters(self) -> None:
        """Set the factors to their initial values."""
        nn.init.zeros_(self.rho)
        nn.init.constant_(self.z, self.initial[1])

    def forward(self, stream: Pair, branch: Branch) -> Pair:
        """Return the stream after a branch."""
        x, x0 = stream
        r = self.initial[0] + self.rho / 100
        x = r.to(x.dtype) * x + self.z.to(x.dtype) * x0
        return x + branch(x), x0


class AfterScalars(Residual):
    """The connection of a layer's second branch: plain, and x_0 is passed on."""

    def forward(self, stream: Pair, branch: Branch) -> Pair:
        """Return the stream after a branch."""
        x, x0 = stream
        return x + branch(x), x0


class ScalarsEnds(ResidualEnds):
    """The stream of residual scalars starts as (x, x_0), and ends as x."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def start(self, x: Float[Tensor, "B T D"]) -> Pair:
        """Return the stream before the first branch."""
        return x, F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def forward(self, stream: Pair) -> Float[Tensor, "B T D"]:
        """Return the vectors that the final norm reads."""
        return stream[0]
