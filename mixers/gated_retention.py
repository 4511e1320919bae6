"""Gated retention, gRet (YOCO, arXiv 2405.05254, §3.1).

    q, k, v = x W_Q, x W_K, x W_V by head;  q and k are rotated by the angle n theta at position n
    gamma_n = sigmoid(x_n W_gamma)^(1/tau)      one scalar per head
    S_n = gamma_n S_{n-1} + k_n^T v_n           o_n = q_n S_n / sqrt(K)
    y   = (swish(x W_G) * RMSNorm(o)) W_O       the norm is per head, without weights

This is retention with decays that depend on the token. Values are as wide as the model; retention has them twice as
wide. Two defaults differ from the authors' code, which has RetNet's angles (`rotation: retnet`) and an eps of 1e-5.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from ..ops.decay import decay
from .parts import QKV, Call, QKVConfig, QKVMixer, RecurrenceOutput
from .parts.gates import gate_decay
from .parts.qkv import Rotation


class GatedRetentionConfig(QKVConfig):
    """Gated retention: a matrix state per head, with a decay that depends on the token."""

    kind: Literal["gated_retention"] = "gated_retention"
    gate_logit_normalizer: float = Field(default=16.0, ge=1e-3, le=1e6, examples=[1.0])
    """Exponent tau of the forget gates: larger values give a longer memory; 16 as in the authors' code."""
    rotation: Rotation = "rope"

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "GatedRetention":
        return GatedRetention(self, d_model)


class GatedRetention(QKVMixer):
    """Layer configured by `GatedRetentionConfig`."""

    log_decay_shape = "B T H"

    def __init__(self, config: GatedRetentionConfig, d_model: int) -> None:
        super().__init__(config, d_model, gamma=config.n_heads)

    def recur(self, x: Tensor, h: QKV, call: Call) -> RecurrenceOutput:
        return decay(h.q, h.k, h.v, gate_decay(h.more["gamma"], self.config.gate_logit_normalizer), call)
