"""Gated DeltaNet-2 (Hatamizadeh, Choi and Kautz, arXiv 2605.22791).

    q, k, v = silu(conv(x W_Q)), silu(conv(x W_K)), silu(conv(x W_V)) by head;  q and k divided by their norms
    b_t, w_t = sigmoid(x_t W_b), sigmoid(x_t W_w)   erase rate per key dimension, write rate per value dimension
    S_t     = (I - k_t (b_t * k_t)^T) diag(alpha_t) S_{t-1} + k_t (w_t * v_t)^T        o_t = q_t S_t / sqrt(K)

alpha and y are as in KDA. If b and w are the same scalar for all dimensions, this is KDA. b goes up to 2 with
allow_neg_eigval. The output gate differs between codes: silu with a bias in the authors' code (`gate: swish`,
`gate_bias: true`), a sigmoid with a bias in fla (`gate_bias: true`), and by default a sigmoid without a bias here, as
in KDA.
"""

from typing import Literal

from torch import Tensor

from ..ops.dplr import DPLR, dplr
from .delta_net import write_rate
from .kda import KDA, KeyDecayConfig
from .parts import QKV, Call, RecurrenceOutput, head_width


class GatedDeltaNet2Config(KeyDecayConfig):
    """Gated DeltaNet-2: KDA with separate gates for erasing and for writing, each per dimension."""

    kind: Literal["gated_delta_net2"] = "gated_delta_net2"
    family = DPLR

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "GatedDeltaNet2":
        return GatedDeltaNet2(self, d_model)


class GatedDeltaNet2(KDA):
    """Layer configured by `GatedDeltaNet2Config`."""

    def __init__(self, config: GatedDeltaNet2Config, d_model: int) -> None:
        keys = head_width(d_model, config.expand_k, config.n_heads, "expand_k")
        values = head_width(d_model, config.expand_v, config.n_heads, "expand_v")
        super().__init__(config, d_model, erase=config.n_heads * keys, write=config.n_heads * values)

    def recur(self, x: Tensor, h: QKV, call: Call) -> RecurrenceOutput:
        erase, write = (h.more[name].unflatten(-1, (self.n_heads, -1)) for name in ("erase", "write"))
        erase = write_rate(erase, h.k.dtype, neg_eigval=self.config.allow_neg_eigval)
        return dplr(h.q, h.k, h.v * write.sigmoid().to(h.v.dtype), h.k * erase, None, self.log_decay(x), call)
