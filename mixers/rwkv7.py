"""RWKV-7's time mixing (Peng et al., arXiv 2503.14456, §4.1).

    x^i_t   = x_t + mu^i * (x_{t-1} - x_t)      for each i of r, w, k, v, a, g
    r, k, v = x^r W_r, x^k W_k, x^v W_v         kappa = k * xi divided by its norm, per head
    w_t     = exp(-e^{-1/2} sigmoid(tanh(x^w W_1) W_2 + b_w))       eta_t = sigmoid(x^a W_3 W_4 + b_a)      by channel
    k_t     = k_t * (1 + (eta_t - 1) * alpha)       v_t = v_t + sigmoid(x^v W_7 W_8 + b_v) * (v^1_t - v_t)
    S_t     = (diag(w_t) - (eta_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T
    o_t     = GroupNorm(r_t S_t) + (sum_K rho * r_t * k_t) v_t      y = (o * (sigmoid(x^g W_5) W_6)) W_o

kappa is removed from the state before it decays. As w is at least e^{-0.61}, this equals removing kappa / w from the
state after it has decayed. v^1 is the v of the model's first RWKV-7 layer. One difference from the authors' code: W_o
and the low-rank maps start random, not at 0.
"""

from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.delta import unit_norm
from ..ops.dplr import DPLR, dplr
from .base.layer_call import MixResult
from .base.roles import Role, RowBlock
from .base.traits import Traits
from .delta_net import DeltaChunk
from .parts import Call, LowRank, MatrixState, MatrixStateConfig, MatrixStateMixer, Paradigm, head_width
from .parts.bonus_norm import BonusNorm
from .parts.gates import LowRanks
from .parts.outside_values import OutsideValues
from .parts.projections import apply_row_blocks
from .parts.qkv import Heads
from .parts.token_shift import TokenShift


class RWKV7Config(LowRanks, MatrixStateConfig):
    """RWKV-7: a matrix state per head with a decay per key dimension; each token removes one key and writes another."""

    kind: Literal["rwkv7"] = "rwkv7"
    built_in = MappingProxyType({"gate": "low-rank", "head_norm": "group"})
    family = DPLR._replace(flops=partial(DPLR.flops, n_keys=2))
    n_heads: Heads
    key_eps: float = Field(default=1e-6, gt=0)
    """Constant added to the squared length of the removed key kappa before it is divided by its length."""
    norm_eps: float = Field(default=1e-5, ge=0)
    """Constant that is multiplied by the width of a head and added to the variance in the output norm."""
    chunk_size: DeltaChunk = 64

    @property
    def traits(self) -> Traits:
        """Traits of the op family; layers after the first mix in its values."""
        return replace(super().traits, value_residual=True)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "RWKV7":
        return RWKV7(self, d_model, layer_idx, n_layers)


class RWKV7(OutsideValues[MatrixState], MatrixStateMixer):
    """Layer configured by `RWKV7Config`; mu, decays and rates start as in the authors' code for its depth."""

    log_decay_shape = "B T H K"

    def __init__(self, config: RWKV7Config, d_model: int, layer_idx: int, n_layers: int) -> None:
        super().__init__(config)
        self.config = config
        self.n_heads = config.n_heads
        self.depth = layer_idx / max(n_layers - 1, 1)
        self.key_dim = self.value_dim = head_width(d_model, 1.0, config.n_heads, "1")
        self.value_heads, self.value_width = self.n_heads, d_model
        self.convolution = TokenShift(d_model, [p * (1 - layer_idx / n_layers) for p in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)])
        self.removed, self.replaced = (nn.Parameter(torch.empty(self.n_heads, self.key_dim)) for _ in range(2))
        self.in_proj, self.out_proj = (nn.Linear(d_model, n * d_model, bias=False) for n in (3, 1))
        self.parameter_roles = {
            "in_proj.weight": [RowBlock(name, d_model, heads=self.n_heads) for name in ("r", "k", "v")],
            "removed": Role.VECTOR,
            "replaced": Role.VECTOR,
        }
        self.decay_proj = LowRank(d_model, config.rank, d_model, bias=True, activation="tanh", role=Role.GATE)
        self.rate_proj = LowRank(d_model, config.rank, d_model, bias=True, role=Role.GATE)
        self.gate_proj = LowRank(d_model, config.ranks[2], d_model, bias=False, activation="sigmoid")
        self.value_proj: ValueResidual | None = None
        self.norm = BonusNorm(config.n_heads, self.key_dim, config.norm_eps, ((layer_idx + 1) / n_layers) ** 0.7)
        self.reset_parameters()

    def accept_first_values(self) -> None:
        self.value_proj = ValueResidual(self.out_proj.in_features, self.config.ranks[1]).to(self.device, self.dtype)
        self.takes_first_values = True

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise mu and biases by channel and depth, and orthogonal matrices."""
        for layer in cast("Any", self.children()):
            layer.reset_parameters()
        for weight, gain in zip((*self.in_proj.weight.chunk(3), self.out_proj.weight), (1, 0.1, 1, 1), strict=True):
            weight.copy_(nn.init.orthogonal_(torch.empty_like(weight, dtype=torch.float32), gain=gain))
        channel = torch.arange(self.removed.numel(), device=self.device, dtype=torch.float64)
        fraction = channel / max(len(channel) - 1, 1)
        inner = 2 * (channel % self.key_dim) / max(self.key_dim - 1, 1) - 1
        zigzag = inner * inner.abs()
        self.decay_proj.up.bias.copy_(-5.5 + 6 * fraction ** (1 + self.depth**0.3) + 2.5 * zigzag)
        self.rate_proj.up.bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * (fraction - 0.5))
        self.removed.copy_((0.76 - 0.1 * fraction).view_as(self.removed))
        self.replaced.fill_(1.02)

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> MixResult[MatrixState]:
        wide = self.state_dtype
        by_head = (self.n_heads, -1)
        (xr, xw, xk, xv, xa, xg), recent = self.convolve(x, call)
        r, k, own_values = apply_row_blocks(self.in_proj, (xr, xk, xv))
        v = own_values if self.value_proj is None else self.value_proj.mix_in(own_values, call.first_values, xv)
        r, k, v, decay, rate = (y.unflatten(-1, by_head) for y in (r, k, v, self.decay_proj(xw), self.rate_proj(xa)))
        v = self.with_outside_values(v, x, call)
        log_decay = -0.6065306597126334 * decay.to(wide).sigmoid()
        rate = rate.to(wide).sigmoid()
        k = k.to(wide)
        kappa = unit_norm(k * self.removed.to(wide), self.config.key_eps)
        k = (k * (1 + (rate - 1) * self.replaced.to(wide))).to(r.dtype)
        o, memory = dplr(r, k, v, -kappa * (-log_decay).exp(), rate * kappa, log_decay, call.enter("memory"), scale=1.0)
        y = self.out_proj(self.norm(o, r, k, v).flatten(2) * self.gate_proj(xg))
        return MixResult(y, self.state_after(x, memory, recent, call), own_values)

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        return super().flops(length, paradigm, context) + self.outside_flops * length


class ValueResidual(LowRank):
    """Mixture of a layer's values v with the first layer's values v^1, v + nu * (v^1 - v) by channel, arXiv 2410.17897.

    nu = sigmoid(x W_1 W_2 + b), with a low-rank W_1 W_2.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__(width, rank, width, bias=True, role=Role.GATE)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise nu, the share of the first values, from about 0.72 in the first channel to 0.63 in the last."""
        super().reset_parameters()
        bias = self.up.bias
        bias.copy_(torch.linspace(0.93, 0.53, len(bias), device=bias.device, dtype=torch.float64))

    def mix_in(
        self, v: Float[Tensor, "B T C"], first: Float[Tensor, "B T C"] | None, x: Float[Tensor, "B T C"]
    ) -> Float[Tensor, "B T C"]:
        """Return v mixed with the values of the first layer."""
        assert first is not None
        return v.lerp(first.to(v.dtype), self(x).sigmoid())
