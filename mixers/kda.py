"""Kimi Delta Attention, KDA (Kimi Team, arXiv 2510.26692, Eq. 1 and §4).

    q, k, v = silu(conv(x W_Q)), silu(conv(x W_K)), silu(conv(x W_V)) by head;  q and k divided by their norms
    beta_t  = sigmoid(x_t W_b)  one scalar per head, from 0 to 1 (to 2 with allow_neg_eigval)
    alpha_t = exp(-e^{A_log} softplus(x_t W_1 W_2 + dt_bias))  one scalar per key dimension, a rate e^{A_log} per head
    S_t     = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T          o_t = q_t S_t / sqrt(K)
    y       = (sigmoid(x W_3 W_4) * RMSNorm(o)) W_O    the norm is per head, its weights are shared by all heads

KDA is Gated DeltaNet with a decay per key dimension. The rank of the maps to decays and output gate is the width of a
head. As in the released models, the gate has no bias by default. The norm cancels the factor 1/sqrt(K) except for its
eps. With decay_lower_bound c, as in GLM, alpha_t = exp(c sigmoid(e^{A_log} (x_t W_1 W_2 + dt_bias))), and A_log starts
at 0. With `precondition`, the state writes with beta_t m_t * k_t in place of beta_t k_t (PKDA, arXiv 2604.21100);
parts/preconditioner.py has m_t. With fewer key heads than heads, there is one m_t per key head, and per head in the
code of PKDA's authors.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from .base.roles import Role
from .delta_net import DeltaConfig, PreconditionedConfig, write_rate
from .parts import QKV, Call, LowRank, RecurrenceOutput, TimeStepDecay
from .parts.preconditioner import PreconditionedMixer
from .parts.qkv import OutputGate


class KeyDecayConfig(DeltaConfig):
    """Fields of mixers of the delta family with a decay per key dimension."""

    rotation: Literal["none"] = "none"  # pyright: ignore[reportIncompatibleVariableOverride] narrower type
    """Always `none`: decays that differ within a pair of dimensions do not commute with rotating the pair."""
    gate: OutputGate = "sigmoid"
    gate_rank: int | None = Field(default=None, gt=0, le=2**20, examples=[3, None])
    """Rank of the maps from tokens to decays and to the output gate; the width of a head's values when null."""
    gate_bias: bool = False
    """True if the output gate has a bias, as in the layer of the library fla (flash-linear-attention)."""
    decay_lower_bound: float | None = Field(default=None, lt=0, ge=-1000, examples=[-5.0])
    """Lower bound of the log-decays, enforced by a sigmoid; null for unbounded log-decays, from softplus."""


class KDAConfig(KeyDecayConfig, PreconditionedConfig):  # pyright: ignore[reportIncompatibleVariableOverride] narrower type
    """KDA: a matrix state per head with a decay per key dimension; each token replaces the value of its key."""

    kind: Literal["kda"] = "kda"

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "KDA":
        return KDA(self, d_model, beta=self.n_heads)


class KDA(PreconditionedMixer):
    """Layer configured by `KDAConfig`; decays start as in the authors' code."""

    log_decay_shape = "B T H K"
    silu_without_conv = True
    projects_gate = False

    def __init__(self, config: KeyDecayConfig, d_model: int, **more: int) -> None:
        super().__init__(config, d_model, rates=(1.0, 16.0), **more)
        rank = config.gate_rank or self.value_dim
        gate = config.gate != "none"
        self.decay_proj = LowRank(d_model, rank, self.n_heads * self.key_dim, bias=False, role=Role.GATE)
        bound = config.decay_lower_bound
        rates = (1.0, 16.0 if config.decay_lower_bound is None else 1.0)
        self.decay = TimeStepDecay(self.n_heads, rates, key_dim=self.key_dim, lower_bound=bound)
        values = self.n_heads * self.value_dim
        bias = config.gate_bias
        self.gate_proj = LowRank(d_model, rank, values, bias=bias) if gate else None

    def project(self, x: Tensor, call: Call) -> QKV:
        h = super().project(x, call)
        return h if self.gate_proj is None else h._replace(gate=self.gate_proj(x).unflatten(-1, (self.n_heads, -1)))

    def log_decay(self, x: Tensor) -> Tensor:
        """Return the natural log of alpha, [B T H K]."""
        return self.decay(self.decay_proj(x).unflatten(-1, (self.n_heads, -1)))[1]

    def recur(self, x: Tensor, h: QKV, call: Call) -> RecurrenceOutput:
        beta = write_rate(h.more["beta"], self.state_dtype, neg_eigval=self.config.allow_neg_eigval)
        return self.update(h, beta, self.log_decay(x), call)
