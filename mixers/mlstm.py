"""mLSTM, the matrix memory of xLSTM (Beck et al., arXiv 2405.04517, Eq. 19 to 27), in the layer of xLSTM 7B (arXiv
2503.13427, §3).

    q, k, v = x W_Q, x W_K, x W_V by head
    i_t, f_t = cap(x_t W_i + b_i), cap(x_t W_f + b_f)       cap(y) = c tanh(y / c)       one scalar per head
    C_t = sigmoid(f_t) C_{t-1} + e^{i_t} k_t v_t^T          n_t = sigmoid(f_t) n_{t-1} + e^{i_t} k_t
    o_t = q_t C_t / max(|q_t n_t|, sqrt(K))
    y   = (sigmoid(x W_G) * LayerNorm(o)) W_O               the norm is per head, with a weight per channel

Exponential gates leave the range of floats. With l_t = log(sigmoid(f_t) e^{l_{t-1}} + e^{i_t}), the state stores l and
the weighted means A = C / e^l and n / e^l.

    A_t = (1 - z_t) A_{t-1} + z_t k_t v_t^T                 z_t = sigmoid(i_t - log sigmoid(f_t) - l_{t-1})

The paper instead divides by the exponential of a running maximum, for the same purpose. The layer of xLSTM 7B adds 1e-6
to the denominator and initialises b_i as -10; here nothing is added and b_i is normal, as in the first paper.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from ..ops.decay import decay
from ..ops.scan import LOG_STATE, SCAN_PARADIGMS, log_scan
from .base.layer_call import Mixed
from .base.roles import Role
from .parts import QKV, Call, Paradigm, QKVConfig, QKVMixer, RecurrenceOutput
from .parts.gates import GatedNorm
from .parts.qkv import Affine, KeyExpansion, OutputGate, OutputNorm
from .parts.token_shift import token_shift

MAX_EXPONENT = 80.0
"""Upper limit of exponents; e^88 is the end of the range of float32."""


class MLSTMConfig(QKVConfig):
    """mLSTM: a matrix state per head with exponential input gates, read through a normaliser."""

    kind: Literal["mlstm"] = "mlstm"
    expand_k: KeyExpansion = 0.5
    gate: OutputGate = "sigmoid"
    gate_soft_cap: float | None = Field(default=15.0, gt=0, le=40, examples=[5.0, None])
    """Soft limit c on the logits of input and forget gates; null for no limit, as in the first paper."""
    head_norm: OutputNorm = "group"
    norm_affine: Affine = True

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "MLSTM":
        return MLSTM(self, d_model)


class MLSTMState(NamedTuple):
    """State of mLSTM after a prefix."""

    memory: Float[Tensor, "B H K V+1"]
    """Matrix memory C of each head with the normaliser n as its last column, divided by e^l; float32 or float64."""
    weight: Float[Tensor, "B H"]
    """Natural log l of the sum of the decayed weights of all tokens, float64; -inf at the start."""
    recent: Float[Tensor, "B W-1 C"]
    """Last inputs of the short convolution, oldest first; empty without a short convolution."""
    position: Int[Tensor, " B"]
    """Number of tokens processed."""


class MLSTM(QKVMixer):
    """Layer configured by `MLSTMConfig`."""

    log_decay_shape = "B T H"
    wide_output = True  # terms of the denominator may cancel, so that rounding to 16 bits would be too coarse

    def __init__(self, config: MLSTMConfig, d_model: int) -> None:
        super().__init__(config, d_model, i=config.n_heads, f=config.n_heads)
        self.gate_bias = nn.Parameter(torch.empty(2, self.n_heads))
        self.parameter_roles = {**self.parameter_roles, "gate_bias": Role.RATE}
        self.value_dim += 1  # the width of the state, with n
        self.reset_parameters()

    def output_norm(self, width: int) -> GatedNorm:
        config = self.config
        heads = self.n_heads
        return GatedNorm(
            width, config.head_norm, config.gate, affine=config.norm_affine, eps=config.norm_eps, heads=heads
        )

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if (bias := getattr(self, "gate_bias", None)) is not None:
            with torch.no_grad():
                nn.init.normal_(bias[0], std=0.1)
                bias[1].copy_(torch.linspace(3, 6, self.n_heads))

    def mix(  # pyright: ignore[reportIncompatibleMethodOverride] another state type
        self, x: Float[Tensor, "B T D"], call: Call
    ) -> Mixed[MLSTMState]:
        h = self.project(x, call)
        weight = self.init_state(call.rows(x.shape[0])).weight if call.state is None else call.state.weight
        # every paradigm of the scan gives the same result
        paradigm = call.paradigm if call.paradigm in SCAN_PARADIGMS else Paradigm.CHUNKWISE
        scanned = call._replace(paradigm=paradigm, state=weight)
        i, log_forget = self.gates(h)
        weights, weight_after = log_scan(i, log_forget, scanned)
        log_odds = (token_shift(weights, weight[:, None], call)[0] + log_forget - i).to(self.state_dtype)
        extras = {"log_odds": log_odds, "weights": weights}
        o, memory = self.recur(x, h._replace(more=extras), call.enter("memory"))
        y, after = self.project_out(x, h, o, memory, call)
        after = None if after is None or weight_after is None else MLSTMState(after[0], weight_after, *after[1:])
        return self.with_own_values(y, after, h.own_values)

    def gates(self, h: QKV) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"]]:
        """Return the logits i_t of the input gate, and log sigmoid(f_t) of the forget gate; float32 or float64."""
        wide = self.state_dtype
        cap = self.config.gate_soft_cap
        i, f = (h.more[name].to(wide) + b for name, b in zip("if", self.gate_bias.to(wide), strict=True))
        if cap is not None:
            i, f = (cap * torch.tanh(y / cap) for y in (i, f))
        return i, F.logsigmoid(f)

    def recur(self, x: Tensor, h: QKV, call: Call) -> RecurrenceOutput:
        # sigmoid(log_odds) is the share of the old state, sigmoid(-log_odds) that of the new token
        log_odds = h.more["log_odds"]
        weights = h.more["weights"]
        k = ((-log_odds).sigmoid()[..., None] * h.k).to(h.k.dtype)
        values = F.pad(h.v, (0, 1), value=1.0)
        o, memory = decay(h.q, k, values, F.logsigmoid(log_odds), call, wide_output=True)
        min_denominator = (-weights).clamp(max=MAX_EXPONENT).exp()[..., None].to(o.dtype)
        return RecurrenceOutput(o[..., :-1] / torch.maximum(o[..., -1:].abs(), min_denominator), memory)

    def init_state(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, batch_size: int, *, max_length: int | None = None
    ) -> MLSTMState:
        state = super().init_state(batch_size)
        weight = torch.full_like(state.memory[:, :, 0, 0], -torch.inf, dtype=LOG_STATE)
        return MLSTMState(state.memory, weight, state.recent, state.position)
