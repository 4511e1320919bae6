"""A gated network: (f(x W_g) * x W_u) W_d (Shazeer, arXiv 2002.05202; f = silu is SwiGLU, f = gelu is GeGLU)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import ACTIVATIONS, Activation, FeedForward, FfnConfig, HiddenMap


class SwigluConfig(FfnConfig):
    """Gated network (f(x W_g) * x W_u) W_d; with an expansion of 8/3 it has as many parameters as an mlp with 4."""

    kind: Literal["swiglu"] = "swiglu"
    activation: Activation = "silu"
    """Activation function f of the gate."""
    bias: bool = False
    """True to add biases to all three linear maps."""

    def build(self, d_model: int) -> "Swiglu":
        """Build the network."""
        return Swiglu(self, d_model)


class Swiglu(FeedForward):
    """The gated network (f(x W_g) * x W_u) W_d, see `SwigluConfig`."""

    def __init__(self, config: SwigluConfig, d_model: int) -> None:
        super().__init__()
        self.activation: Activation = config.activation
        hidden = config.hidden_width(d_model)
        self.gate_proj = nn.Linear(d_model, hidden, bias=config.bias)
        self.up_proj = nn.Linear(d_model, hidden, bias=config.bias)
        self.down_proj = nn.Linear(hidden, d_model, bias=config.bias)

        self.hidden_channels = 2 * hidden

    def forward(self, x: Float[Tensor, "B T D"], hidden: HiddenMap | None = None) -> Float[Tensor, "B T D"]:  # noqa: D102
        gate, up = self.gate_proj(x), self.up_proj(x)
        if hidden is not None:
            gate, up = hidden(torch.cat((gate, up), dim=-1)).chunk(2, dim=-1)
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up)
