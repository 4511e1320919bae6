"""The plain residual connection (arXiv 1512.03385): x = x + f(x) for every branch f."""

from typing import Literal

from torch import Tensor

from . import Branch, Residual, ResidualConfig


class PlainConfig(ResidualConfig):
    """Configuration of the plain connection x + f(x)."""

    kind: Literal["plain"] = "plain"

    def build(self, d_model: int, *, index: int, place: int, layer: int) -> "Plain":  # noqa: ARG002 no parameters
        """Build the connection."""
        return Plain()


class Plain(Residual):
    """The connection x + f(x)."""

    def forward(self, stream: Tensor, branch: Branch) -> Tensor:
        """Return the stream after a branch."""
        return stream + branch(stream)
