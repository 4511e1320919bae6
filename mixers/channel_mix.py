"""RWKV's channel mixing: a network that also reads the previous token (Peng et al., arXiv 2305.13048, Eq. 18).

    k_t, r_t = (mu * x_t + (1 - mu) * x_{t-1}) W      a mu and a W for each of the two
    y_t      = sigmoid(r_t) * (relu(k_t)^2 W_v)
    ungated: k_t = (x_t + mu * (x_{t-1} - x_t)) W,  y_t = relu(k_t)^2 W_v        RWKV-7 (arXiv 2503.14456, Eq. 22)

Its state is the last token, so it is a mixer here. It has a block of its own without a feed-forward network: RWKV-4 is
the pattern [rwkv4, channel_mix]. One difference: all matrices start orthogonal. In the authors' code, W_v starts at 0,
and in RWKV-4 so does the matrix of r.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from ..ops.runtime.paradigm import Paradigm
from ..ops.scan import SCAN_PARADIGMS
from .base.contract import MixerConfig, SequenceMixer
from .base.roles import Role
from .base.traits import Traits
from .parts import Call
from .parts.token_shift import token_shift


class ChannelMixConfig(MixerConfig):
    """RWKV's channel mixing: a feed-forward network with squared ReLU on each token mixed with the previous one."""

    kind: Literal["channel_mix"] = "channel_mix"
    expansion: float = Field(default=4.0, gt=0, le=1000, examples=[2.0])
    """Hidden width divided by d_model; the width is rounded to a whole number."""
    gate: bool = True
    """True for a gated network, in which mu is the weight of the current token (RWKV-4); False for an ungated one, in
    which mu is the weight of the previous token (RWKV-7)."""
    paradigm: Paradigm = Field(default=Paradigm.CHUNKWISE, strict=False)
    """Paradigm of training and evaluation; all paradigms are the same computation here."""

    @property
    def traits(self) -> Traits:
        """Traits of a mixer with a constant state that does not depend on positions."""
        return Traits(paradigms=SCAN_PARADIGMS, state="constant", packing=True, shift_invariant=True)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "ChannelMix":
        return ChannelMix(self, d_model, layer_idx, n_layers)


class ChannelMixState(NamedTuple):
    """State of channel mixing after a prefix: its last token."""

    recent: Float[Tensor, "B 1 D"]
    """Input x of the last token."""
    position: Int[Tensor, " B"]
    """Number of tokens processed."""


class ChannelMix(SequenceMixer[ChannelMixState]):
    """Layer configured by `ChannelMixConfig`; mu is initialised as in the authors' code for a layer of this depth."""

    supports_context_parallel = True

    def __init__(self, config: ChannelMixConfig, d_model: int, layer_idx: int, n_layers: int) -> None:
        super().__init__(config)
        self.gated = config.gate
        self.remaining_depth = 1 - layer_idx / n_layers
        width = max(round(config.expansion * d_model), 1)
        self.parameter_roles = {"shift": Role.VECTOR}
        self.shift = nn.Parameter(torch.empty(1 + config.gate, d_model))
        self.k_proj = nn.Linear(d_model, width, bias=False)
        self.v_proj = nn.Linear(width, d_model, bias=False)
        self.r_proj = nn.Linear(d_model, d_model, bias=False) if config.gate else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise mu by channel and depth, and the matrices as orthogonal."""
        for layer in (self.k_proj, self.v_proj, self.r_proj):
            if layer is not None:
                matrix = torch.empty_like(layer.weight, dtype=self.state_dtype)  # orthogonal_ needs a wide dtype
                nn.init.orthogonal_(matrix, gain=max(layer.out_features / layer.in_features, 1) ** 0.5)
                layer.weight.copy_(matrix)
        d_model = self.shift.shape[1]
        fraction = torch.arange(d_model, device=self.device, dtype=torch.float64) / d_model
        self.shift.copy_(fraction**self.remaining_depth if self.gated else 1 - fraction ** (self.remaining_depth**4))

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], ChannelMixState | None]:
        state = self.init_state(call.rows(x.shape[0])) if call.state is None else call.state
        shifted, recent = token_shift(x, state.recent, call)
        ends = (shifted, x) if self.gated else (x, shifted)
        k, *r = (torch.lerp(*ends, mu.to(x.dtype)) for mu in self.shift)
        y = self.v_proj(self.k_proj(k).relu().square())
        if self.r_proj is not None:
            y = self.r_proj(*r).sigmoid() * y
        if recent is None:
            return y, None
        return y, ChannelMixState(recent.to(self.dtype), call.advance(x, state.position))

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        return 2 * length * sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> ChannelMixState:
        del max_length
        recent = torch.zeros(batch_size, 1, self.shift.shape[1], device=self.device, dtype=self.dtype)
        return ChannelMixState(recent, torch.zeros(batch_size, device=self.device, dtype=torch.int64))
