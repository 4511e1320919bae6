"""Gated linear attention, GLA (Yang et al., arXiv 2312.06635, §4.1 and 4.4).

    q, k, v = x W_Q, x W_K, x W_V by head
    alpha_t = sigmoid(x_t W_1 W_2 + b)^(1/tau)      one scalar per key dimension; W_1 W_2 has rank 16
    S_t = diag(alpha_t) S_{t-1} + k_t^T v_t         o_t = q_t S_t / sqrt(K)
    y   = (swish(x W_R) * RMSNorm(o)) W_O           the norm is per head, its weights are shared by all heads

Like the authors' code, and unlike the paper, the norm is an RMS norm instead of a layer norm, the output gate has no
bias, and there is a factor 1/sqrt(K), which the norm cancels except for its eps (1e-6 here, 1e-5 in the authors'
layer).
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ..ops.decay import decay
from .base.roles import Role
from .parts import QKV, Call, LowRank, QKVConfig, QKVMixer, RecurrenceOutput
from .parts.gates import gate_decay
from .parts.qkv import Affine, KeyExpansion


class GLAConfig(QKVConfig):
    """GLA: a matrix state per head, with a decay per key dimension that depends on the token."""

    kind: Literal["gla"] = "gla"
    expand_k: KeyExpansion = 0.5
    gate_rank: int = Field(default=16, gt=0, le=2**20, examples=[2])
    """Rank of the map from tokens to decays."""
    gate_logit_normalizer: float = Field(default=16.0, ge=1e-3, le=1e6, examples=[1.0])
    """Exponent tau of the forget gates: larger values give a longer memory."""
    rotation: Literal["none"] = "none"  # pyright: ignore[reportIncompatibleVariableOverride] narrower type
    """Always `none`: decays that differ within a pair of dimensions do not commute with rotating the pair, so scores
    would depend on absolute position."""
    norm_affine: Affine = True

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "GLA":
        return GLA(self, d_model)


class GLA(QKVMixer):
    """Layer configured by `GLAConfig`; decays start near 2^(-1/tau)."""

    log_decay_shape = "B T H K"

    def __init__(self, config: GLAConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.decay_proj = LowRank(d_model, config.gate_rank, self.n_heads * self.key_dim, bias=True, role=Role.GATE)

    @torch.no_grad()
    def set_reach(self, tokens: Float[Tensor, " H"]) -> list[str]:
        power = -self.config.gate_logit_normalizer * torch.log1p(1 / tokens)
        bias = power - torch.log(-torch.expm1(power))  # sigmoid(bias) = e^power
        self.decay_proj.up.bias.copy_(bias.repeat_interleave(self.key_dim))
        return ["decay_proj.up.bias"]

    def recur(self, x: Tensor, h: QKV, call: Call) -> RecurrenceOutput:
        logits = self.decay_proj(x).unflatten(-1, (self.n_heads, -1))
        return decay(h.q, h.k, h.v, gate_decay(logits, self.config.gate_logit_normalizer), call)
