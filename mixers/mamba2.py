"""Mamba-2 (state space duality; Dao and Gu, arXiv 2405.21060, Eq. 2 and §7).

    z, (u, B, C), dt = x W_in
    u, B, C = silu(conv((u, B, C))) by channel      dt = softplus(dt + b) per head
    S_t = exp(-dt_t e^{A_log}) S_{t-1} + B_t^T (dt_t u_t)               o_t = C_t S_t + D u_t
    y   = (RMSNorm(o * silu(z)) * w) W_O

A head is the decay op with q = C, k = B, v = dt u and one decay per token. The heads of a group share B and C, and the
norm takes its mean over a group. As in the authors' code, the convolution has a bias, and A_log, D and b are one scalar
per head. Differs: limits of the step hold in decoding; beside an FFN W_O starts over sqrt(n_layers), not 2 n_layers.
"""

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.decay import decay
from .parts import Call, MatrixState, MatrixStateMixer, ShortConv, ShortConvolution, TimeStepDecay, TimeStepFields
from .parts.widths import heads_of


class Mamba2Config(TimeStepFields):
    """Mamba-2: a matrix state per head, whose decay and step size depend on the token."""

    kind: Literal["mamba2"] = "mamba2"
    expand: float = Field(default=2.0, gt=0, le=1000, examples=[1.0])
    """Width of all values (and the gate) over d_model."""
    head_dim: int = Field(default=64, gt=0, le=2**20, examples=[6, 12, 24])
    """Width of a head's values; there are expand * d_model / head_dim heads."""
    d_state: int = Field(default=128, gt=0, le=2**20, examples=[5, 1])
    """Width of a head's keys B and queries C."""
    n_groups: int = Field(default=1, gt=0, le=2**20, examples=[2])
    """Groups of heads; the heads of a group share B and C, and one norm."""
    short_conv: ShortConv = 4
    norm_eps: float = Field(default=1e-5, ge=0)
    """Added to the norm's mean square."""

    @classmethod
    def example_fields(cls) -> dict[str, Any]:
        """Small heads: with the default ones, the smallest model would be 32 wide."""
        return {"head_dim": 6, "d_state": 5}

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Mamba2":
        return Mamba2(self, d_model, n_layers)


class Mamba2(MatrixStateMixer):
    """The layer of `Mamba2Config`; `n_layers` makes the output small at the start, as the authors' models do."""

    log_decay_shape, silu = "B T H", True

    def __init__(self, config: Mamba2Config, d_model: int, n_layers: int = 1) -> None:
        super().__init__(config)
        self.config, self.n_layers, self.n_groups = config, n_layers, config.n_groups
        self.n_heads = heads_of(d_model, config.expand, config.head_dim, config.n_groups)
        self.key_dim, self.value_dim = config.d_state, config.head_dim
        values, keys = self.n_heads * config.head_dim, config.n_groups * config.d_state
        self.widths = [values, keys, keys]
        # one product for gate, what is convolved (values, B, C) and step sizes
        self.in_widths = [values, sum(self.widths), self.n_heads]
        self.in_proj = nn.Linear(d_model, sum(self.in_widths), bias=False)
        self.convolution = ShortConvolution.of(config.short_conv, sum(self.widths), bias=True)
        self.decay = TimeStepDecay(self.n_heads, config.a_range, config.time_step_range, config.time_step_limit)
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm_weight = nn.Parameter(torch.empty(values))
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the authors' code: torch's own for the projections, that of the output over sqrt(n_layers)."""
        for part in cast("Any", self.children()):
            part.reset_parameters()
        self.out_proj.weight.div_(math.sqrt(self.n_layers))
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm_weight)

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], MatrixState | None]:
        gate, mixed, dt = self.in_proj(x).split(self.in_widths, dim=-1)
        mixed, recent = self.convolve(mixed, call)
        u, k, q = mixed.split(self.widths, dim=-1)
        u, (step, log_decay) = u.unflatten(-1, (self.n_heads, -1)), self.decay(dt)
        v = (step[..., None] * u).to(u.dtype)
        o, memory = decay(self._by_head(q), self._by_head(k), v, log_decay, call.enter("memory"), scale=1.0)
        o = (o + self.D.to(u.dtype)[:, None] * u).flatten(2)
        # a product of the output and the gate can leave the range of float16, and its square sooner
        gated = (o.to(self.state_dtype) * F.silu(gate.to(self.state_dtype))).unflatten(-1, (self.n_groups, -1))
        o = F.rms_norm(gated, gated.shape[-1:], eps=self.config.norm_eps).flatten(2).to(u.dtype)
        return self.out_proj(o * self.norm_weight.to(o.dtype)), self.state_after(x, memory, recent, call)

    def _by_head(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T H K"]:
        """B or C, the same for the heads of a group: a view where there is one group."""
        by_group = x.unflatten(-1, (self.n_groups, 1, -1))
        return by_group.expand(-1, -1, -1, self.n_heads // self.n_groups, -1).flatten(2, 3)
