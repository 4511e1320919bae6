"""Residual connections: how the branches of a model read the residual stream and write to it, one file per kind.

    X = start(embedding)                     the stream: a tensor, or a tuple of tensors
    X = connection(X, branch)                for every branch: a mixer or a feed-forward network with its norms
    logits = head(norm(finish(X)))

A branch is a function of vectors [B T D]. What it reads of the stream, and how its output changes the stream, is the
connection's to decide: the plain connection returns x + branch(x). Connections act on every token independently and
have no state.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

from jaxtyping import Float
from torch import Tensor, nn

from ...registry import Config, Registry

Stream: TypeAlias = Any
"""Residual stream between two branches: a tensor, or a (named) tuple of tensors and integers."""
Branch: TypeAlias = Callable[[Tensor], Tensor]
"""Residual branch, [B T D] -> [B T D]: norms and dropout included."""


class Residual(nn.Module, ABC):
    """Residual connection of one branch."""

    @abstractmethod
    def forward(self, stream: Stream, branch: Branch) -> Stream:
        """Return the stream after a branch; `branch` is called once."""

    def reset_parameters(self) -> None:
        """Initialise every parameter."""

    def flops(self, index: int) -> int:
        """Return the FLOPs per token of the products with vectors of width D, without those of the branch.

        Args:
            index: index of the branch in the model; a shared block has several.
        """
        del index
        return 0


class ResidualEnds(nn.Module):
    """Ends of the stream: its start from the embedding, and the vectors that the final norm reads."""

    def start(self, x: Float[Tensor, "B T D"]) -> Stream:
        """Return the stream before the first branch, from the embedding's output."""
        return x

    def forward(self, stream: Stream) -> Float[Tensor, "B T D"]:
        """Return the vectors that the final norm reads, from the stream after the last branch."""
        return stream

    def reset_parameters(self) -> None:
        """Initialise every parameter."""

    def flops(self, n_branches: int) -> int:
        """Return the FLOPs per token of `forward` after `n_branches` branches."""
        del n_branches
        return 0


class ResidualConfig(Config, ABC):
    """Configuration of the residual connections of a model; a subclass declares `kind: Literal["its_name"]`."""

    grows: ClassVar[bool] = False
    """True if the number of tensors in the stream grows with depth; every layer is then compiled by itself."""
    fits_shared_blocks: ClassVar[bool] = True
    """True if the connection of a branch may be used in several layers, as those of a shared block are."""
    kind: Any
    """Name under which the connection is registered; a `Literal` in every subclass."""

    @abstractmethod
    def build(self, d_model: int, *, index: int, place: int, layer: int) -> Residual:
        """Build the connection of one branch.

        Args:
            d_model: width of the vectors that branches read and write.
            index: index of the branch in the model, from 0; for a shared block, in its first layer.
            place: index of the branch in its layer, from 0.
            layer: index of the layer, from 0; for a shared block, of its first layer.
        """

    def build_ends(self, d_model: int, *, n_layers: int) -> ResidualEnds:  # noqa: ARG002 kinds with parameters need it
        """Build the ends of the stream; by default, the stream is a tensor [B T D] from beginning to end."""
        return ResidualEnds()


RESIDUALS = Registry("residual", ResidualConfig, package="seqmix.blocks.residual", entry_points="seqmix.residual")
"""Registry of residual connections: the files of this folder, plug-ins (entry points `seqmix.residual`), and classes
named by dotted path."""
