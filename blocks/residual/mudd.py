"""Dynamic dense connections: every layer reads a sum of the outputs of all earlier layers, weighted per token.

    X_0                                           the embedding; X_i the stream after layer i
    A = W_2 gelu(W_1 RMSNorm(X_i)) + a            weights [i + 1] of a token, RMSNorm without weights
    x = sum_j A_j X_j                             what layer i + 1 reads, and what the final norm reads
    X_{i+1} = x + mixer(x) + ffn(x + mixer(x))    the branches of a layer are plain connections, norms left out here

W_2 starts at 0, and a at 1 for the last output and 0 for the others: the plain residual connection, bit for bit. Xiao
et al., MUDDFormer, arXiv 2502.12170, with one way (R) in place of four: there, queries, keys and values have weights of
their own, which a branch of one input does not. Its norms of large models are left out as well.
"""

from functools import reduce
from operator import add
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ...mixers.base.roles import Role, Roles
from . import Branch, Residual, ResidualConfig, ResidualEnds

Outputs = tuple[Float[Tensor, "B T D"], ...]
"""Stream: the embedding and the outputs of all layers; the last one is the stream of the layer at work."""


class MuddConfig(ResidualConfig):
    """Configuration of dynamic dense connections: each layer reads a sum of all earlier layers' outputs (MUDD)."""

    grows: ClassVar[bool] = True
    fits_shared_blocks: ClassVar[bool] = False
    kind: Literal["mudd"] = "mudd"
    eps: float = Field(default=1e-6, ge=0)
    """Constant added to the mean square of an output."""

    def build(self, d_model: int, *, index: int, place: int, layer: int) -> Residual:  # noqa: ARG002 layers count
        """Build the connection: weights belong to a layer's first branch."""
        if place:
            return LaterBranch()
        return FirstBranch(DynamicSum(d_model, layer + 1, self.eps) if layer else None)

    def build_ends(self, d_model: int, *, n_layers: int) -> "MuddEnds":
        """Build the ends of the stream."""
        return MuddEnds(DynamicSum(d_model, n_layers + 1, self.eps))


class DynamicSum(nn.Module):
    """Sum of outputs, weighted by weights that depend on the last of them."""

    parameter_roles: ClassVar[Roles] = {"down": Role.GATE, "up": Role.GATE, "bias": Role.RATE}

    def __init__(self, d_model: int, n_sources: int, eps: float) -> None:
        super().__init__()
        # not nn.Linear: a model's `init` draws the weights of those at random
        self.down = nn.Parameter(torch.empty(n_sources, d_model))
        self.up = nn.Parameter(torch.empty(n_sources, n_sources))
        self.bias = nn.Parameter(torch.empty(n_sources))
        self.eps = eps

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start with the last output alone."""
        nn.init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        nn.init.zeros_(self.up)
        self.bias.copy_(torch.arange(len(self.bias), device=self.bias.device) == len(self.bias) - 1)

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the weighted sum [B T D] of outputs [B T D]."""
        weights = self.weights(outputs[-1]).to(outputs[-1].dtype)
        return reduce(add, (a * x for a, x in zip(weights.split(1, -1), outputs, strict=True)))

    def weights(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T J"]:
        """Return the weights of all outputs at each token, from the last output x."""
        hidden = F.gelu(F.linear(F.rms_norm(x, x.shape[-1:], eps=self.eps), self.down.to(x.dtype)))
        return F.linear(hidden, self.up.to(hidden.dtype)) + self.bias

    def flops(self) -> int:
        """Return the FLOPs per token of the weights and of the weighted sum."""
        return 4 * self.down.numel() + 2 * self.up.numel()


class FirstBranch(Residual):
    """The connection of a layer's first branch: it reads a sum of the earlier outputs, and its output is a new one.

    `dense` weighs the outputs; it is None in the first layer, which has the embedding alone.
    """

    def __init__(self, dense: DynamicSum | None) -> None:
        super().__init__()
        self.dense = dense

    def reset_parameters(self) -> None:
        """Initialise every parameter."""
        if self.dense is not None:
            self.dense.reset_parameters()

    def forward(self, stream: Outputs, branch: Branch) -> Outputs:
        """Return the outputs after a branch."""
        x = stream[-1] if self.dense is None else self.dense(stream)
        return (*stream, x + branch(x))

    def flops(self, index: int) -> int:
        """Return the FLOPs per token of the weights and of the weighted sum."""
        del index
        return 0 if self.dense is None else self.dense.flops()


class LaterBranch(Residual):
    """The connection of a layer's second branch: plain, on the layer's own output."""

    def forward(self, stream: Outputs, branch: Branch) -> Outputs:
        """Return the outputs after a branch."""
        *earlier, x = stream
        return (*earlier, x + branch(x))


class MuddEnds(ResidualEnds):
    """The stream starts with the embedding as its only output; a last sum is what the final norm reads."""

    def __init__(self, dense: DynamicSum) -> None:
        super().__init__()
        self.dense = dense

    def reset_parameters(self) -> None:
        """Initialise every parameter."""
        self.dense.reset_parameters()

    def start(self, x: Float[Tensor, "B T D"]) -> Outputs:
        """Return the stream before the first branch."""
        return (x,)

    def forward(self, stream: Outputs) -> Float[Tensor, "B T D"]:
        """Return the vectors that the final norm reads."""
        return self.dense(stream)

    def flops(self, n_branches: int) -> int:
        """Return the FLOPs per token of the last sum."""
        del n_branches
        return self.dense.flops()
