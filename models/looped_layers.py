"""Loops: layers of shared blocks, which compute the same function several times in depth.

    x <- x + e_i + z x_0        before iteration i = 0 .. N - 1; the second term from i = 1 on
    x <- x + f(x) / N           for every branch f of a shared block, with `scale`

x_0 is the start of the residual stream. e and z are learned, and start at 0 and at `injection`. An iteration begins at
every layer of the first block that several layers share. Every layer has its own state, so each iteration has one.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..mixers.base.roles import Role, Roles
from ..registry import Config


class Loop(Config):
    """Options of the layers of shared blocks, which repeat in depth."""

    embedding: bool = False
    """True to add a learned vector of the iteration to the residual stream before it; the vectors start at 0."""
    injection: float | None = Field(default=None, examples=[0.0])
    """Initial value of a learned factor of the start of the residual stream, which is then added before every iteration
    but the first; null for none."""
    scale: bool = False
    """True to divide the outputs of mixers and feed-forward networks in shared blocks by the number of iterations."""


class LoopStart(nn.Module):
    """Start of an iteration: the vector of the iteration and the start of the residual stream are added."""

    parameter_roles: ClassVar[Roles] = {"embedding": Role.VECTOR, "injection": Role.VECTOR}

    def __init__(self, config: Loop, d_model: int, iterations: int) -> None:
        super().__init__()
        self.initial = config.injection
        self.embedding = nn.Parameter(torch.empty(iterations, d_model)) if config.embedding else None
        self.injection = nn.Parameter(torch.empty(1)) if config.injection is not None else None

    def reset_parameters(self) -> None:
        """Initialise the vectors as 0, and the factor as configured."""
        if self.embedding is not None:
            nn.init.zeros_(self.embedding)
        if self.injection is not None:
            nn.init.constant_(self.injection, self.initial or 0.0)

    def forward(self, x: Float[Tensor, "B T D"], start: Float[Tensor, "B T D"], iteration: int) -> Tensor:
        """Return the residual stream with which an iteration begins."""
        if self.embedding is not None:
            x = x + self.embedding[iteration].to(x.dtype)
        return x if self.injection is None or not iteration else x + self.injection.to(x.dtype) * start
