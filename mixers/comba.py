"""Comba (Hu et al., arXiv 2506.02475): the delta rule with a feedback that is learned apart from the decay.

    q, k, v = silu(conv(x W_Q)), silu(conv(x W_K)), silu(conv(x W_V)) by head
    q, k    = (q - D sigmoid(d) k), k   each divided by its norm; D and d are one parameter per key head
    p_t     = sigmoid(d) k_t            the key that reads the state (state feedback)
    beta_t  = sigmoid(x_t W_b)          one scalar per head
    alpha_t = exp(-e^{A_log} softplus(x_t W_a + dt_bias))   one scalar per head
    S_t = alpha_t S_{t-1} + beta_t k_t (v_t - p_t^T S_{t-1})^T                         o_t = q_t S_t / sqrt(K)
    y   = (sigmoid(x W_G) * RMSNorm(o)) W_O    the norm is per head, its weights are shared by all heads

The transition alpha_t I - beta_t k_t p_t^T is a scalar plus a matrix of rank one: unlike in Gated DeltaNet, p_t reads
the state before it decays. The subtraction from the query is the output feedback. As in the authors' code, it comes
before the norm, with unnormed keys, and D starts at 1; they suggest 0.02 for small models. Two differences from that
code: its kernels norm p_t again, which cancels the sigmoid(d) of p_t (but not that of the query); and keys are as wide
as d_model, as in `gated_delta_net`. Log-decays below -40 count as -40: e^-40 is less than float64's rounding error.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.dplr import DPLR, dplr
from .delta_net import GroupedValuesConfig, write_rate
from .parts import QKV, Call, QKVMixer, RecurrenceOutput, TimeStepDecay
from .parts.qkv import OutputGate, ValueExpansion

MIN_LOG_DECAY = -40.0
"""Least log-decay; the op reads the decayed state, and the inverse of the decay must be finite."""


class CombaConfig(GroupedValuesConfig):
    """Comba: a matrix state per head that decays; each token subtracts what a shortened key reads before the decay."""

    kind: Literal["comba"] = "comba"
    family = DPLR
    expand_v: ValueExpansion = 2.0
    gate: OutputGate = "sigmoid"
    allow_neg_eigval: Literal[False] = False  # pyright: ignore[reportIncompatibleVariableOverride] narrower type
    """Always false: the least eigenvalue is alpha - beta sigmoid(d), and with beta up to 2 it could lie below -1."""
    output_feedback: float | None = Field(default=1.0, ge=-10, le=10, examples=[0.02, None])
    """Initial value of D, the factor of the feedback key that is subtracted from the query; null for no subtraction."""

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Comba":
        return Comba(self, d_model)


class Comba(QKVMixer):
    """Layer configured by `CombaConfig`; decays start as in Gated DeltaNet, and d at 1."""

    log_decay_shape = "B T H"
    silu_without_conv = True

    def __init__(self, config: CombaConfig, d_model: int) -> None:
        super().__init__(config, d_model, beta=config.n_heads, dt=config.n_heads)
        self.decay = TimeStepDecay(config.n_heads)
        self.feedback = nn.Parameter(torch.empty(self.n_qk_heads))
        has_output = config.output_feedback is not None
        self.output_feedback = nn.Parameter(torch.empty(self.n_qk_heads)) if has_output else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "feedback"):  # not while the base class is built
            nn.init.ones_(self.feedback)
            if self.output_feedback is not None:
                nn.init.constant_(self.output_feedback, self.config.output_feedback)

    def features(self, qk: Float[Tensor, "B T 2H K"]) -> Float[Tensor, "B T 2H K"]:
        """Subtract the output feedback from the queries, then norm queries and keys."""
        if self.output_feedback is not None:
            q, k = qk.split(self.n_qk_heads, dim=2)
            share = (self.output_feedback * self.feedback.sigmoid())[:, None].to(k.dtype)
            qk = torch.cat((q - share * k, k), dim=2)
        return super().features(qk)

    def recur(self, x: Tensor, h: QKV, call: Call) -> RecurrenceOutput:
        beta = write_rate(h.more["beta"], self.state_dtype, neg_eigval=False)
        log_decay = self.decay(h.more["dt"])[1].clamp_min(MIN_LOG_DECAY)
        share = self.feedback.to(beta.dtype).sigmoid().repeat_interleave(self.n_heads // self.n_qk_heads)
        # divided by the decay, because the op reads the decayed state
        reads = (share * (-log_decay).exp())[..., None] * h.k.to(beta.dtype)
        return dplr(h.q, (beta[..., None] * h.k).to(h.k.dtype), h.v, reads, None, log_decay, call)
