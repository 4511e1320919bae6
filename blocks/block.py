"""The pre-norm residual block.

x ──┬── norm ── mixer ── dropout ──(+)──┬── norm ── ffn ── dropout ──(+)── y          (RetNet, Eq. 9)
    └───────────────────────────────┘   └────────────────────────────┘
"""

from typing import Annotated, Any

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from ..mixers import MIXERS, MixerConfig, Paradigm
from ..registry import Config
from .ffn import FFNS, FfnConfig
from .norm import NORMS, NormConfig


class BlockConfig(Config):
    """One kind of layer."""

    mixer: Annotated[MixerConfig, MIXERS]
    """What mixes tokens."""
    ffn: Annotated[FfnConfig, FFNS] | None
    """What maps each token; null for a block that only mixes."""
    norm: Annotated[NormConfig, NORMS]
    """The norm before each of the two."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of the outputs of mixer and ffn, in training."""


class Block(nn.Module):
    """A mixer and a feed-forward network, each on a normed copy of the residual stream."""

    def __init__(self, config: BlockConfig, d_model: int, *, layer_idx: int, n_layers: int) -> None:
        """Build the layer with index `layer_idx` of `n_layers`."""
        super().__init__()
        self.mixer_norm = config.norm.build(d_model)
        self.mixer = config.mixer.build(d_model, layer_idx=layer_idx, n_layers=n_layers)
        self.ffn_norm = config.norm.build(d_model) if config.ffn else None
        self.ffn = config.ffn.build(d_model) if config.ffn else None
        self.dropout = nn.Dropout(config.dropout)

    def reset_parameters(self) -> None:
        """Initialise every parameter, each module as its paper does."""
        for part in (self.mixer_norm, self.mixer, self.ffn_norm, self.ffn):
            if part is not None:
                part.reset_parameters()

    def __getstate__(self) -> dict[str, Any]:
        # compiled code is bound to this object: a copy starts without
        return {name: value for name, value in super().__getstate__().items() if name != "forward"}

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: tuple[Any, ...] | None = None,
        *,
        paradigm: Paradigm | None = None,
        cu_seqlens: Int[Tensor, "N+1"] | None = None,
        return_state: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], tuple[Any, ...] | None]:
        """One layer over one segment; arguments and result are the mixer's."""
        mixed, state = self.mixer(
            self.mixer_norm(x), state, paradigm=paradigm, cu_seqlens=cu_seqlens, return_state=return_state
        )
        x = x + self.dropout(mixed)
        if self.ffn is not None and self.ffn_norm is not None:
            x = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return x, state
