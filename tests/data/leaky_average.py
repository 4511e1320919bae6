"""A leaky average of values, whose leak each token chooses for each head.

    v_t = x_t W_V       f_t = sigmoid(x_t W_F + b)
    h_t = f_t h_{t-1} + (1 - f_t) v_t
    y_t = (h_t * swish(x_t W_G)) W_O

It is of the decay family: 1 - f_t is a key of width 1, and the query is 1.
"""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.decay import DECAY, decay
from ..ops.runtime.call import Call
from .parts import MatrixState, MatrixStateConfig, MatrixStateMixer, head_width


class LeakyAverageConfig(MatrixStateConfig):
    """A leaky average per head."""

    family = DECAY
    kind: Literal["leaky_average"] = "leaky_average"
    n_heads: int = Field(gt=0, examples=[2, 1, 3])
    """Heads, each with its own leak."""

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "LeakyAverage":
        return LeakyAverage(self, d_model)


class LeakyAverage(MatrixStateMixer):
    """The layer of `LeakyAverageConfig`."""

    log_decay_shape = "B T H"

    def __init__(self, config: LeakyAverageConfig, d_model: int) -> None:
        super().__init__(config)
        self.n_heads, self.key_dim = config.n_heads, 1
        self.value_dim = head_width(d_model, 1.0, config.n_heads, "d_model")
        self.in_proj = nn.Linear(d_model, 2 * d_model, bias=False)
        self.leak_proj = nn.Linear(d_model, config.n_heads)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def reset_parameters(self) -> None:
        """As torch's linear layers."""
        for layer in (self.in_proj, self.leak_proj, self.out_proj):
            layer.reset_parameters()

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], MatrixState | None]:
        v, gate = self.in_proj(x).chunk(2, dim=-1)
        v, recent = self.convolve(v, call)
        leak = self.leak_proj(x).to(self.state_dtype)
        k = (-leak).sigmoid().to(v.dtype)[..., None]
        v = v.unflatten(-1, (self.n_heads, -1))
        h, memory = decay(k.new_ones(k.shape), k, v, F.logsigmoid(leak), call.enter("memory"), scale=1.0)
        return self.out_proj(h.flatten(2) * F.silu(gate)), self.state_after(x, memory, recent, call)
