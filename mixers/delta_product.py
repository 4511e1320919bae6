"""DeltaProduct (Siems et al., arXiv 2502.10297), with the forget gate of its gated variant.

    q, k_i, v_i = silu(conv(x W_Q)), silu(conv(x W_Ki)), silu(conv(x W_Vi)) by head;  q and k_i divided by their norms
    beta_i  = sigmoid(x_t W_bi)   one scalar per head and step i = 1 .. n, from 0 to 1 (to 2 with allow_neg_eigval)
    alpha_t = exp(-e^{A_log} softplus(x_t W_a + dt_bias))   one scalar per head; 1 without forget_gate
    S      <- alpha_t S;  then n times  S <- S + beta_i k_i (v_i - k_i^T S)^T          o_t = q_t S / sqrt(K)
    y       = (silu(x W_G) * RMSNorm(o)) W_O    the norm is per head, its weights are shared by all heads

A token's transition is a product of n Householder matrices, which can be any rotation of n dimensions. In DeltaNet it
is at most a reflection. With n = 1 this is Gated DeltaNet, which has the same alpha. The norm cancels the factor
1/sqrt(K) except for its eps.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from ..ops.delta import delta_product
from .delta_net import DeltaConfig, write_rate
from .parts import QKV, Call, QKVMixer, RecurrenceOutput, TimeStepDecay


class DeltaProductConfig(DeltaConfig):
    """DeltaProduct: a matrix state per head, in which each token replaces the values of several keys, one by one."""

    kind: Literal["delta_product"] = "delta_product"
    n_steps: int = Field(default=2, gt=0, le=128, examples=[1, 3, 4])
    """Number of delta-rule steps per token, each with its own key and value."""
    forget_gate: bool = True
    """True if the state decays before the steps of a token."""
    allow_neg_eigval: bool = True
    """True to scale the write rate up to 2: one step can then reflect the state, and two steps can rotate it."""

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "DeltaProduct":
        return DeltaProduct(self, d_model)


class DeltaProduct(QKVMixer):
    """Layer configured by `DeltaProductConfig`; the decays start as in Gated DeltaNet."""

    silu_without_conv = True

    def __init__(self, config: DeltaProductConfig, d_model: int) -> None:
        self.steps = config.n_steps
        heads = config.n_heads
        gate = {"dt": heads} if config.forget_gate else {}
        super().__init__(config, d_model, beta=self.steps * heads, **gate)
        self.decay = TimeStepDecay(heads) if config.forget_gate else None
        self.log_decay_shape = "B T H" if config.forget_gate else None

    def recur(self, x: Tensor, h: QKV, call: Call) -> RecurrenceOutput:
        beta = write_rate(self.by_step(h.more["beta"]), self.state_dtype, neg_eigval=self.config.allow_neg_eigval)
        log_decay = None if self.decay is None else self.decay(h.more["dt"])[1]
        return delta_product(h.q, h.k, h.v, beta, log_decay, call)
