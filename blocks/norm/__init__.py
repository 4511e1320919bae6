"""Norms of the residual stream: the protocol, and one file per kind."""

from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

from pydantic import Field
from torch import Tensor

from ...registry import Config, Registry


@runtime_checkable
class Norm(Protocol):
    """A module [B T D] -> [B T D] that can initialise itself, as nn.LayerNorm."""

    def __call__(self, input: Tensor, /) -> Tensor:
        """Normalise every token."""
        ...

    def reset_parameters(self) -> None:
        """Initialise every parameter."""
        ...


class NormConfig(Config, ABC):
    """The configuration of a norm over the residual stream; a subclass declares `kind: Literal["its_name"]`."""

    kind: Any
    """The name it is registered under: a `Literal` in every subclass."""
    eps: float = Field(ge=0)
    """Added to the variance."""

    @abstractmethod
    def build(self, d_model: int) -> Norm:
        """Build the module for a residual stream of width `d_model`."""


NORMS = Registry("norm", NormConfig, package="seqmix.blocks.norm")
"""All norms: the files of this folder, and dotted paths."""
