"""Norms of the residual stream: a protocol, and one file per kind of norm."""

from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

from pydantic import Field
from torch import Tensor

from ...registry import Config, Registry


@runtime_checkable
class Norm(Protocol):
    """A module [B T D] -> [B T D] that can initialise its parameters, such as nn.LayerNorm."""

    def __call__(self, input: Tensor, /) -> Tensor:
        """Normalise every token."""
        ...

    def reset_parameters(self) -> None:
        """Initialise every parameter."""
        ...


class NormConfig(Config, ABC):
    """Configuration of a norm of the residual stream; a subclass declares `kind: Literal["its_name"]`."""

    kind: Any
    """Name under which the norm is registered; a `Literal` in every subclass."""
    eps: float = Field(ge=0)
    """Constant added to the variance or mean square, against division by 0."""

    @abstractmethod
    def build(self, d_model: int) -> Norm:
        """Build the module for a residual stream of width `d_model`."""


NORMS = Registry("norm", NormConfig, package="seqmix.blocks.norm")
"""Registry of norms: the files of this folder, and classes named by dotted path."""
