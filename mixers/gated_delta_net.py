"""Gated DeltaNet (Yang, Kautz and Hatamizadeh, arXiv 2412.06464).

    q, k, v = silu(conv(x W_Q)), silu(conv(x W_K)), silu(conv(x W_V)) by head;  q and k divided by their norms
    beta_t = sigmoid(x_t W_b)   one scalar per head, from 0 to 1 (to 2 with allow_neg_eigval)
    alpha_t = exp(-e^{A_log} softplus(x_t W_a + dt_bias))   one scalar per head
    S_t = alpha_t S_{t-1} + beta_t k_t (v_t - alpha_t k_t^T S_{t-1})^T                 o_t = q_t S_t / sqrt(K)
    y   = (silu(x W_G) * RMSNorm(o)) W_O    the norm is per head, its weights are shared by all heads

The state decays by alpha_t as in Mamba-2, and the value at k_t is replaced as in DeltaNet. In the authors' models, keys
are 3/4 as wide as d_model and values twice as wide as keys. Here keys are as wide as d_model, which allows any number
of heads that divides d_model. Like the authors' code, and unlike the paper, there is a factor 1/sqrt(K), which the norm
cancels except for its eps. With `precondition`, the state writes with beta_t m_t * k_t in place of beta_t k_t (PGDN,
arXiv 2604.21100); parts/preconditioner.py has m_t.
"""

from typing import Literal

from torch import Tensor

from .delta_net import PreconditionedConfig, write_rate
from .parts import QKV, Call, RecurrenceOutput, TimeStepDecay
from .parts.preconditioner import PreconditionedMixer
from .parts.qkv import ValueExpansion


class GatedDeltaNetConfig(PreconditionedConfig):
    """Gated DeltaNet: a matrix state per head that decays, and in which each token replaces the value of its key."""

    kind: Literal["gated_delta_net"] = "gated_delta_net"
    expand_v: ValueExpansion = 2.0

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "GatedDeltaNet":
        return GatedDeltaNet(self, d_model)


class GatedDeltaNet(PreconditionedMixer):
    """Layer configured by `GatedDeltaNetConfig`; decays start as in the authors' code."""

    log_decay_shape = "B T H"
    silu_without_conv = True

    def __init__(self, config: GatedDeltaNetConfig, d_model: int) -> None:
        super().__init__(config, d_model, beta=config.n_heads, dt=config.n_heads)
        self.decay = TimeStepDecay(config.n_heads)

    def recur(self, x: Tensor, h: QKV, call: Call) -> RecurrenceOutput:
        beta = write_rate(h.more["beta"], self.state_dtype, neg_eigval=self.config.allow_neg_eigval)
        _, log_decay = self.decay(h.more["dt"])
        return self.update(h, beta, log_decay, call)
