"""A plain feed-forward network, two linear maps with an activation between: f(x W_1) W_2, as in the RetNet paper."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from . import ACTIVATIONS, Activation, FeedForward, FfnConfig, HiddenMap


class MlpConfig(FfnConfig):
    """Configuration of the network f(x W_1) W_2."""

    kind: Literal["mlp"] = "mlp"
    activation: Activation = "gelu"
    """Activation function f."""
    bias: bool = False
    """True to add biases to both linear maps."""

    def build(self, d_model: int) -> "Mlp":
        """Build the network."""
        return Mlp(self, d_model)


class Mlp(FeedForward):
    """The network f(x W_1) W_2, see `MlpConfig`."""

    def __init__(self, config: MlpConfig, d_model: int) -> None:
        super().__init__()
        self.activation: Activation = config.activation
        self.up_proj = nn.Linear(d_model, config.hidden_width(d_model), bias=config.bias)
        self.down_proj = nn.Linear(config.hidden_width(d_model), d_model, bias=config.bias)

        self.hidden_channels = self.up_proj.out_features

    def forward(self, x: Float[Tensor, "B T D"], hidden: HiddenMap | None = None) -> Float[Tensor, "B T D"]:  # noqa: D102
        h = self.up_proj(x)
        return self.down_proj(ACTIVATIONS[self.activation](h if hidden is None else hidden(h)))
