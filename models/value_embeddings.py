"""Value embeddings: a table of vectors of the tokens for some layers, which are added to the values of their mixers."""

from pydantic import Field

from ..registry import Config


class ValueEmbeddings(Config):
    """Value embeddings, v + c sigmoid(x_:n W) E[token] (modded-nanogpt, nanochat).

    Every such layer has a table E of its own, and a gate per head of its values, from the first n channels of the
    mixer's input x.
    """

    every: int = Field(default=2, gt=0)
    """Distance between layers with value embeddings, counted back from the last layer: 2 for alternate layers, 1 for
    all."""
    scale: float = Field(default=2.0, ge=0)
    """Factor c of the gates, which start at c / 2."""
    gate_channels: int = Field(default=12, gt=0)
    """Number n of channels that the gates read."""

    def layers(self, n_layers: int) -> tuple[int, ...]:
        """Return the indices of the layers with value embeddings, in order."""
        return tuple(range((n_layers - 1) % self.every, n_layers, self.every))
