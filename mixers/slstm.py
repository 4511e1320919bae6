"""sLSTM, the scalar memory of xLSTM with memory mixing (Beck et al., arXiv 2405.04517, Eq. 8 to 18).

    u          = silu(conv(x) + b_c)
    i, f       = u W_i + h_{t-1} R_i + b_i,  u W_f + h_{t-1} R_f + b_f       logits; W, R block-diagonal by head
    z, o       = x W_z + h_{t-1} R_z + b_z,  x W_o + h_{t-1} R_o + b_o
    c_t        = f' c_{t-1} + e^i tanh(z)          f' = sigmoid(f), or e^f (`forget_gate: exp`)
    n_t        = f' n_{t-1} + e^i
    h_t        = sigmoid(o) c_t / n_t              y = LayerNorm(h), per head, with a weight per channel

The gates of a token read the output of the token before, so that tokens can only be computed one after another: the
recurrent paradigm is the only one. In exchange the layer tracks states, such as parity, that mLSTM and all recurrences
with decays from 0 to 1 cannot.

Exponential gates leave the range of floats. Where the paper divides by the exponential of a running maximum, the state
is c / n, which is a weighted mean, and log n. The authors' vanilla code takes its first step differently if *all* rows
of a batch are at their start; here each row does. As in the authors' code, there is no output projection (the FFN
after it mixes the heads), R and the biases of i, z and o start at 0, and the forget biases fall from 5 to -7 over the
channels of a head, with a power that grows with the depth.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from ..ops.cell import CELL_PARADIGMS, Backend, slstm
from ..ops.scan import LOG_STATE
from .base.contract import MixerConfig
from .base.roles import Role
from .base.traits import Traits
from .parts import Call, GatedNorm, Paradigm, ShortConv, ShortConvolution, head_width
from .parts.qkv import Affine, Heads
from .parts.scan_state import ScanMixer


class SLSTMConfig(MixerConfig):
    """sLSTM: scalar memories whose gates read the last output of their head; sequential, but it tracks states."""

    kind: Literal["slstm"] = "slstm"
    n_heads: Heads
    short_conv: ShortConv = 4
    forget_gate: Literal["sigmoid", "exp"] = "sigmoid"
    """Activation of the forget gate."""
    norm_affine: Affine = True
    norm_eps: float = Field(default=1e-5, ge=0)
    """Constant added to the variance in the output norm."""
    backend: Backend = "auto"
    """Kernel backend; changes the cost, never the result."""
    paradigm: Paradigm = Field(default=Paradigm.RECURRENT, strict=False)
    """Paradigm of training and evaluation."""

    @property
    def traits(self) -> Traits:
        """Traits: the recurrent paradigm, a constant state, no dependence on position."""
        return Traits(paradigms=CELL_PARADIGMS, state="constant", packing=True, shift_invariant=True)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "SLSTM":
        return SLSTM(self, d_model, layer_idx / max(n_layers - 1, 1))


class SLSTMState(NamedTuple):
    """State of sLSTM after a prefix."""

    memory: Float[Tensor, "B H 2 K"]
    """Output h and weighted mean c / n of each head, float32 or float64."""
    weight: Float[Tensor, "B H K"]
    """Natural log of n, float64; -inf at the start."""
    recent: Float[Tensor, "B W-1 C"]
    """Last inputs of the short convolution, oldest first; empty without a short convolution."""
    position: Int[Tensor, " B"]
    """Number of tokens processed."""


class SLSTM(ScanMixer):
    """Layer configured by `SLSTMConfig`; `depth` is 0 for the first layer of a model, and 1 for the last."""

    op = "slstm"
    supports_context_parallel = False

    def __init__(self, config: SLSTMConfig, d_model: int, depth: float) -> None:
        self.width = head_width(d_model, 1.0, config.n_heads, "1")
        super().__init__(config, config.n_heads, 2, self.width)
        self.depth = depth
        self.d_model = d_model
        self.convolution = ShortConvolution.of(config.short_conv, d_model, bias=True)
        shape = (config.n_heads, self.width, 4 * self.width)
        self.gate_weight = nn.Parameter(torch.empty(shape))
        self.recurrent_weight = nn.Parameter(torch.empty(shape))
        self.gate_bias = nn.Parameter(torch.empty(config.n_heads, 4 * self.width))
        self.parameter_roles = {
            "gate_weight": Role.GATE,
            "recurrent_weight": Role.GATE,
            "gate_bias": Role.RATE,
        }
        self.norm = GatedNorm(
            self.width, "group", "none", affine=config.norm_affine, eps=config.norm_eps, heads=config.n_heads
        )
        self.products = self.gate_weight.numel() + self.recurrent_weight.numel()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the authors' code: small normal W, R of 0, and forget biases by channel and depth."""
        super().reset_parameters()
        nn.init.normal_(self.gate_weight, std=(2 / (5 * self.d_model)) ** 0.5)
        nn.init.zeros_(self.recurrent_weight)
        nn.init.zeros_(self.gate_bias)
        channel = torch.arange(self.width, device=self.device, dtype=torch.float64) / max(self.width - 1, 1)
        self.gate_bias[:, self.width : 2 * self.width] = 5 - 12 * channel ** (0.3 + 1.3 * self.depth)

    def mix(  # pyright: ignore[reportIncompatibleMethodOverride] another state type
        self, x: Float[Tensor, "B T D"], call: Call
    ) -> tuple[Float[Tensor, "B T D"], SLSTMState | None]:
        u, recent = self.convolve(x, call)
        by_head = (self.config.n_heads, self.width)
        weights = self.gate_weight.to(x.dtype).split(2 * self.width, dim=-1)
        inputs = (u.unflatten(-1, by_head), x.unflatten(-1, by_head))  # i and f read u, z and o read x
        logits = torch.cat([torch.einsum("bthd,hde->bthe", *pair) for pair in zip(inputs, weights, strict=True)], -1)
        gates = logits.to(self.state_dtype) + self.gate_bias.to(self.state_dtype)
        state = call.state
        h, memory, weight = slstm(
            gates,
            self.recurrent_weight.to(self.state_dtype),
            call._replace(state=None if state is None else (state.memory, state.weight)),
            exponential=self.config.forget_gate == "exp",
        )
        y = self.norm(h, None).to(x.dtype).flatten(2)
        if memory is None or weight is None:
            return y, None
        return y, SLSTMState(memory, weight, recent, call.advance(x, None if state is None else state.position))

    def init_state(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, batch_size: int, *, max_length: int | None = None
    ) -> SLSTMState:
        memory, recent, position = super().init_state(batch_size)
        weight = torch.full_like(memory[:, :, 0], -torch.inf, dtype=LOG_STATE)
        return SLSTMState(memory, weight, recent, position)
