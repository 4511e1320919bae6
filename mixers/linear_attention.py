"""Linear attention (Katharopoulos et al., arXiv 2006.16236, Eq. 9 to 12, 16 to 20).

    S_t = S_{t-1} + phi(k_t)^T v_t      z_t = z_{t-1} + phi(k_t)
    o_t = phi(q_t) S_t / (phi(q_t) z_t + eps)       with the denominator
    o_t = phi(q_t) S_t / sqrt(K)                    without

The running sum z of the denominator is one more column of the state: the values get a column of ones, so that z is
carried, packed and differentiated exactly as S is. With a rotation, phi(q) and phi(k) are rotated, as in RoFormer
(arXiv 2104.09864, Eq. 19).
"""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from ..ops.decay import decay
from .parts import QKV, Call, QKVConfig, QKVMixer, RecurrenceOutput
from .parts.qkv import OutputGate, OutputNorm


class LinearAttentionConfig(QKVConfig):
    """Linear attention: a matrix state per head to which every token adds, without decay."""

    kind: Literal["linear_attention"] = "linear_attention"
    feature_map: Literal["elu", "relu", "softmax", "identity"] = "elu"
    """Feature map phi: `elu` is elu(x) + 1 (the paper's), `softmax` is over the width of a head. Only `identity` can be
    negative."""
    denominator: bool = True
    """True to divide by the sum of the weights, so that the output is a weighted mean of the values."""
    eps: float = Field(default=1e-6, gt=0)
    """Constant added to the denominator."""
    gate: OutputGate = "none"
    head_norm: OutputNorm = "none"
    """Norm of the output of each head; without a norm or denominator, the output grows with T."""

    @model_validator(mode="after")
    def _check_denominator(self) -> "LinearAttentionConfig":
        if self.denominator and self.feature_map == "identity":
            raise ValueError(
                "denominator = true needs a non-negative feature_map, got identity: choose elu, relu or softmax"
            )
        if self.denominator and self.rotation != "none":
            raise ValueError(
                f"denominator = true needs rotation = none, got {self.rotation}, which can make weights negative"
            )
        return self

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "LinearAttention":
        return LinearAttention(self, d_model)


class LinearAttention(QKVMixer):
    """Layer configured by `LinearAttentionConfig`; initialised as attention is."""

    gains = (2**-0.5, 1.0)

    def __init__(self, config: LinearAttentionConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.value_dim += config.denominator  # the width of the state, with z
        # numerator and denominator grow with T: only their quotient fits 16 bits
        self.wide_output = config.denominator

    def recur(self, x: Tensor, h: QKV, call: Call) -> RecurrenceOutput:
        if not self.config.denominator:
            return decay(h.q, h.k, h.v, None, call)
        o, memory = decay(h.q, h.k, F.pad(h.v, (0, 1), value=1.0), None, call, scale=1.0, wide_output=True)
        return RecurrenceOutput(o[..., :-1] / (o[..., -1:] + self.config.eps), memory)

    def features(self, qk: Float[Tensor, "B T 2H K"]) -> Float[Tensor, "B T 2H K"]:
        """Apply the feature map phi to queries and keys, after their norm."""
        qk = super().features(qk)
        if self.config.feature_map == "elu":
            return F.elu(qk) + 1
        if self.config.feature_map == "relu":
            return qk.relu()
        return qk.softmax(-1) if self.config.feature_map == "softmax" else qk
