"""Linear attention (Katharopoulos et al., arXiv 2006.16236, Eq. 9 to 12, 16 to 20).

    S_t = S_{t-1} + phi(k_t)^T v_t      z_t = z_{t-1} + phi(k_t)
    o_t = phi(q_t) S_t / (phi(q_t) z_t + eps)       with the denominator
    o_t = phi(q_t) S_t / sqrt(K)                    without

The denominator's running sum z is one more column of the state: the values get a column of ones, so that z is carried,
packed and differentiated exactly as S is. A rotation turns phi(q) and phi(k), as RoFormer's (arXiv 2104.09864, Eq. 19).
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
    """Linear attention: a matrix state per head that only grows by addition."""

    kind: Literal["linear_attention"] = "linear_attention"
    feature_map: Literal["elu", "relu", "softmax", "identity"] = "elu"
    """phi: `elu` is elu(x) + 1 (the paper's), `softmax` is over a head's width; only `identity` can be negative."""
    denominator: bool = True
    """Whether the output is a weighted mean of the values."""
    eps: float = Field(default=1e-6, gt=0)
    """Added to the denominator."""
    gate: OutputGate = "none"
    head_norm: OutputNorm = "none"
    """Without a denominator the output grows with T unless normed."""

    @model_validator(mode="after")
    def _denominator_needs_weights(self) -> "LinearAttentionConfig":
        if self.denominator and self.feature_map == "identity":
            raise ValueError("a denominator needs weights that are never negative; feature_map is identity")
        if self.denominator and self.rotation != "none":
            raise ValueError(
                f"a denominator needs weights that are never negative; rotation is {self.rotation}, which turns them"
            )
        return self

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "LinearAttention":
        return LinearAttention(self, d_model)


class LinearAttention(QKVMixer):
    """The layer of `LinearAttentionConfig`; starts as attention does."""

    gains = (2**-0.5, 1.0)

    def __init__(self, config: LinearAttentionConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.value_dim += config.denominator  # of the state
        # numerator and denominator grow with T: only their quotient may be narrow
        self.wide_output = config.denominator

    def recur(self, x: Tensor, h: QKV, call: Call) -> RecurrenceOutput:
        if not self.config.denominator:
            return decay(h.q, h.k, h.v, None, call)
        o, memory = decay(h.q, h.k, F.pad(h.v, (0, 1), value=1.0), None, call, scale=1.0, wide_output=True)
        return RecurrenceOutput(o[..., :-1] / (o[..., -1:] + self.config.eps), memory)

    def features(self, qk: Float[Tensor, "B T 2H K"]) -> Float[Tensor, "B T 2H K"]:
        """phi of queries and keys."""
        qk = super().features(qk)
        if self.config.feature_map == "elu":
            return F.elu(qk) + 1
        if self.config.feature_map == "relu":
            return qk.relu()
        return qk.softmax(-1) if self.config.feature_map == "softmax" else qk
