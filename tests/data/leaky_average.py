"""A leaky average of values, whose leak each token chooses for each head.

    v_t = x_t W_V       f_t = sigmoid(x_t W_F + b)
    h_t = f_t h_{t-1} + (1 - f_t) v_t
    y_t = (h_t * swish(x_t W_G)) W_O

It is of the decay family: 1 - f_t is a key one wide, and the query is 1.
"""

from typing import Literal, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.decay.api import decay, decay_flops
from ..ops.paradigm import Paradigm
from .contract import MixerConfig, SequenceMixer, Traits
from .heads import head_width


class LeakyAverageConfig(MixerConfig):
    """A leaky average a head."""

    kind: Literal["leaky_average"] = "leaky_average"
    n_heads: int = Field(gt=0, examples=[2, 1, 3])
    """Heads, each with a leak of its own."""
    paradigm: Paradigm = Field(default=Paradigm.CHUNKWISE, strict=False)
    """The paradigm of training and evaluation."""

    @property
    def traits(self) -> Traits:
        """All paradigms; positions play no part."""
        return Traits(paradigms=frozenset(Paradigm), state="constant", packing=True, shift_invariant=True)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "LeakyAverage":
        """Build the layer."""
        return LeakyAverage(self, d_model)


class LeakyAverageState(NamedTuple):
    """What is kept of the tokens that were read."""

    memory: Float[Tensor, "B H 1 V"]
    """h."""


class LeakyAverage(SequenceMixer[LeakyAverageState]):
    """The layer of `LeakyAverageConfig`."""

    splits = True

    def __init__(self, config: LeakyAverageConfig, d_model: int) -> None:
        super().__init__(config)
        self.config, self.width = config, head_width(d_model, 1.0, config.n_heads, "d_model")
        self.in_proj = nn.Linear(d_model, 2 * d_model, bias=False)
        self.leak_proj = nn.Linear(d_model, config.n_heads)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def reset_parameters(self) -> None:
        """As torch's linear layers."""
        for layer in (self.in_proj, self.leak_proj, self.out_proj):
            layer.reset_parameters()

    def mix(self, x, state, paradigm, cu_seqlens, return_state):
        v, gate = (part.unflatten(-1, (-1, self.width)) for part in self.in_proj(x).chunk(2, -1))
        leak = self.leak_proj(x).to(self.state_dtype)
        k = (-leak).sigmoid().to(v.dtype)[..., None]
        output, memory = decay(
            paradigm,
            v.new_ones(k.shape),
            k,
            v,
            F.logsigmoid(leak),
            scale=1.0,
            initial_state=None if state is None else state.memory,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            context=self.context,
        )
        y = self.out_proj((output * F.silu(gate)).flatten(2))
        return y, None if memory is None else LeakyAverageState(memory)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> LeakyAverageState:
        shape = (batch_size, self.config.n_heads, 1, self.width)
        return LeakyAverageState(self.out_proj.weight.new_zeros(shape, dtype=self.state_dtype))

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        weights = sum(layer.weight.numel() for layer in (self.in_proj, self.leak_proj, self.out_proj))
        return 2 * length * weights + self.config.n_heads * decay_flops(
            paradigm, length, 1, self.width, context=context
        )
