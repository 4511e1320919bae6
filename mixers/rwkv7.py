"""RWKV-7's time mixing (Peng et al., arXiv 2503.14456, §4.1).

    x^i_t   = x_t + mu^i * (x_{t-1} - x_t)      for each i of r, w, k, v, a, g
    r, k, v = x^r W_r, x^k W_k, x^v W_v         kappa = k * xi divided by its norm, per head
    w_t     = exp(-e^{-1/2} sigmoid(tanh(x^w W_1) W_2 + b_w))       eta_t = sigmoid(x^a W_3 W_4 + b_a)      by channel
    k_t     = k_t * (1 + (eta_t - 1) * alpha)
    S_t     = (diag(w_t) - (eta_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T
    o_t     = GroupNorm(r_t S_t) + (sum_K rho * r_t * k_t) v_t      y = (o * (sigmoid(x^g W_5) W_6)) W_o

kappa is removed from the state that has not decayed: as w is at least e^{-0.61}, that is kappa / w of the one that has.
Differs from the paper: a layer's values are its own, where the authors' later layers take a part from the first one's;
1e-6 is added to |kappa|^2, and maps of low rank and W_o start at random, not at 0.
"""

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.delta import unit_norm
from ..ops.dplr import DPLR, dplr
from .delta_net import DeltaChunk
from .parts import Call, LowRank, MatrixState, MatrixStateConfig, MatrixStateMixer, head_width
from .parts.qkv import Heads
from .parts.token_shift import TokenShift


class RWKV7Config(MatrixStateConfig):
    """RWKV-7: a matrix state per head whose key dimensions decay, and in which each token replaces what it removes."""

    kind: Literal["rwkv7"] = "rwkv7"
    family = DPLR._replace(flops=partial(DPLR.flops, n_keys=2))
    n_heads: Heads
    rank: int = Field(default=32, gt=0, le=2**20, examples=[3])
    """Rank of the maps from tokens to decays and to rates; the output gate's has twice as much."""
    norm_eps: float = Field(default=1e-5, ge=0)
    """Times the width of a head, added to the variance of its output."""
    chunk_size: DeltaChunk = 64

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "RWKV7":
        return RWKV7(self, d_model, layer_idx, n_layers)


class RWKV7(MatrixStateMixer):
    """The layer of `RWKV7Config`; mixtures, decays and rates start as in the authors' code for its depth."""

    log_decay_shape = "B T H K"

    def __init__(self, config: RWKV7Config, d_model: int, layer_idx: int, n_layers: int) -> None:
        super().__init__(config)
        self.config, self.n_heads, self.place = config, config.n_heads, (layer_idx, n_layers)
        self.key_dim = self.value_dim = head_width(d_model, 1.0, config.n_heads, "1")
        self.norm_eps, shape = config.norm_eps * self.key_dim, (config.n_heads, self.key_dim)
        powers = (power * (1 - layer_idx / n_layers) for power in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2))
        self.convolution = TokenShift(d_model, list(powers))
        self.removed, self.replaced, self.bonus = (nn.Parameter(torch.empty(shape)) for _ in range(3))
        self.norm_weight, self.norm_bias = (nn.Parameter(torch.empty(shape)) for _ in range(2))
        self.in_proj, self.out_proj = (nn.Linear(d_model, n * d_model, bias=False) for n in (3, 1))
        self.decay_proj = LowRank(d_model, config.rank, d_model, bias=True, activation="tanh")
        self.rate_proj = LowRank(d_model, config.rank, d_model, bias=True)
        self.gate_proj = LowRank(d_model, 2 * config.rank, d_model, bias=False, activation="sigmoid")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mixtures and biases by channel and depth, orthogonal matrices."""
        for layer in self.children():
            if isinstance(layer, LowRank | TokenShift):
                layer.reset_parameters()
        for weight, gain in zip((*self.in_proj.weight.chunk(3), self.out_proj.weight), (1, 0.1, 1, 1), strict=True):
            weight.copy_(nn.init.orthogonal_(torch.empty_like(weight, dtype=torch.float32), gain=gain))
        (layer_idx, n_layers), width = self.place, self.bonus.numel()
        channel = torch.arange(width, device=self.device, dtype=torch.float64)
        part, inner = channel / max(width - 1, 1), 2 * (channel % self.key_dim) / max(self.key_dim - 1, 1) - 1
        depth, zigzag = (layer_idx / max(n_layers - 1, 1)) ** 0.3, inner * inner.abs()
        self.decay_proj.up.bias.copy_(-5.5 + 6 * part ** (1 + depth) + 2.5 * zigzag)
        self.rate_proj.up.bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * (part - 0.5))
        self.removed.copy_((0.76 - 0.1 * part).view_as(self.removed))
        self.norm_weight.fill_(((layer_idx + 1) / n_layers) ** 0.7)
        for parameter, number in ((self.replaced, 1.02), (self.bonus, -0.04), (self.norm_bias, 0.0)):
            parameter.fill_(number)

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], MatrixState | None]:
        wide = self.state_dtype
        (xr, xw, xk, xv, xa, xg), recent = self.convolve(x, call)
        maps = (*map(F.linear, (xr, xk, xv), self.in_proj.weight.chunk(3)), self.decay_proj(xw), self.rate_proj(xa))
        r, k, v, decay, rate = (y.unflatten(-1, (self.n_heads, -1)) for y in maps)
        log_decay, rate, k = -math.exp(-0.5) * decay.to(wide).sigmoid(), rate.to(wide).sigmoid(), k.to(wide)
        kappa = unit_norm(k * self.removed.to(wide))
        k = (k * (1 + (rate - 1) * self.replaced.to(wide))).to(r.dtype)
        o, memory = dplr(r, k, v, -kappa * (-log_decay).exp(), rate * kappa, log_decay, call.enter("memory"), 1.0)
        o = F.layer_norm(o.to(wide), o.shape[-1:], eps=self.norm_eps) * self.norm_weight.to(wide)
        bonus = (self.bonus.to(wide) * r * k).sum(-1, keepdim=True) * v
        y = self.out_proj((o + self.norm_bias.to(wide) + bonus).to(v.dtype).flatten(2) * self.gate_proj(xg))
        return y, self.state_after(x, memory, recent, call)
