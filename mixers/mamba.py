"""Mamba (selective state spaces; Gu and Dao, arXiv 2312.00752, Algorithm 2, §3.4 and 3.6).

    u, z = x W_in                            u = silu(conv(u)) by channel
    dt, B, C = u W_x                         Delta = softplus(dt W_dt + b) per channel; W_dt has a low rank
    h_t = exp(-Delta_t e^{A_log}) h_{t-1} + B_t^T (Delta_t u_t)         one vector of N numbers per channel
    y   = ((C_t h_t + D u_t) * silu(z)) W_out

All channels share B and C. The states of all tokens never exist at the same time: the backward pass recomputes the
states of a few blocks at a time. As in the authors' code, B is discretised as Delta B (Euler). With `inner_norm: rms`,
dt, B and C each pass through an RMSNorm with weights (Jamba, arXiv 2403.19887).
"""

import math
from types import MappingProxyType
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.scan import selective_scan
from .base.roles import Role, RowBlock
from .parts import Call, GatedNorm, ShortConvolution
from .parts.matrix_state import Chunk
from .parts.scan_state import ScanConfig, ScanMixer, ScanState
from .parts.time_step import in_range, step_bias
from .parts.widths import head_width


class MambaConfig(ScanConfig):
    """Mamba: a vector per channel as the state, with decays and step sizes that depend on the token."""

    kind: Literal["mamba"] = "mamba"
    built_in = MappingProxyType({"gate": "swish"})
    expand: float = Field(default=2.0, gt=0, le=1000, examples=[1.0])
    """Number of channels of the recurrence, and of the gate, divided by d_model."""
    d_state: int = Field(default=16, gt=0, le=2**20, examples=[5, 1])
    """Size N of the state per channel."""
    dt_rank: int | None = Field(default=None, gt=0, le=2**20, examples=[2])
    """Rank of the map from tokens to step sizes; d_model / 16 when null."""
    short_conv: int = Field(default=4, gt=0, le=64, examples=[2])
    """Width of the short convolution in tokens."""
    time_step_range: Annotated[tuple[float, float], in_range(1e-6, 1e3)] = Field(default=(1e-3, 0.1), strict=False)
    """Range of the initial step sizes, from 1e-6 to 1e3: evenly spaced in the logarithm, for an input of zero."""
    inner_norm: Literal["rms", "none"] = "none"
    """Norm of dt, B and C, each over its own width and with weights (Jamba); or `none`."""
    norm_eps: float = Field(default=1e-6, ge=0)
    """Constant added to the mean square in `inner_norm`."""
    chunk_size: Chunk = 16

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Mamba":
        return Mamba(self, d_model)


class Mamba(ScanMixer):
    """Layer configured by `MambaConfig`."""

    op = "selective_scan"

    def __init__(self, config: MambaConfig, d_model: int) -> None:
        width = head_width(d_model, config.expand, 1, "expand")
        super().__init__(config, config.d_state, width)
        rank = math.ceil(d_model / 16) if config.dt_rank is None else config.dt_rank
        self.widths = [rank, config.d_state, config.d_state]
        self.in_proj = nn.Linear(d_model, 2 * width, bias=False)
        self.convolution = ShortConvolution(width, config.short_conv, bias=True)
        self.x_proj = nn.Linear(width, sum(self.widths), bias=False)
        self.dt_norm, self.k_norm, self.q_norm = (self._inner_norm(width) for width in self.widths)
        self.dt_proj = nn.Linear(rank, width)
        self.A_log = nn.Parameter(torch.empty(config.d_state, width))
        self.parameter_roles = {
            "in_proj.weight": [RowBlock("v", width), RowBlock("gate", width)],
            "x_proj.weight": [
                RowBlock("dt", rank, Role.GATE),
                *(RowBlock(name, config.d_state) for name in ("k", "q")),
            ],
            "dt_proj.weight": Role.GATE,
            "dt_proj.bias": Role.RATE,
            "A_log": Role.RATE,
        }
        self.D = nn.Parameter(torch.empty(width))
        self.out_proj = nn.Linear(width, d_model, bias=False)
        self.products = self.A_log.numel()  # the product C h
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the authors' code: torch's defaults for projections, rates 1 to N per channel (S4D-Real)."""
        super().reset_parameters()
        bound = self.dt_proj.in_features**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        self.dt_proj.bias.copy_(step_bias(torch.rand_like(self.D, dtype=torch.float64), self.config.time_step_range))
        self.A_log.copy_(torch.arange(1, len(self.A_log) + 1, device=self.D.device).log()[:, None])
        nn.init.ones_(self.D)

    def _inner_norm(self, width: int) -> GatedNorm | None:
        """Return the norm of dt, B or C; None without `inner_norm`."""
        if self.config.inner_norm == "none":
            return None
        return GatedNorm(width, "rms", "none", affine=True, eps=self.config.norm_eps)

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], ScanState | None]:
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u, recent = self.convolve(u, call)
        dt, k, q = self.x_proj(u).split(self.widths, dim=-1)
        norms = (self.dt_norm, self.k_norm, self.q_norm)
        dt, k, q = (y if norm is None else norm(y, None) for norm, y in zip(norms, (dt, k, q), strict=True))
        wide = self.state_dtype  # 16 bits cannot tell a decay of 0.999 from 1, and products leave the range of float16
        step = F.softplus(F.linear(dt.to(u.dtype), self.dt_proj.weight).to(wide) + self.dt_proj.bias.to(wide))
        o, memory = selective_scan(
            step * u.to(wide), step, -self.A_log.to(wide).exp(), k.to(wide), q.to(wide), call.enter("memory")
        )
        o = (o + self.D.to(wide) * u.to(wide)) * F.silu(gate.to(wide))
        return self.out_proj(o.to(u.dtype)), self.state_after(x, memory, recent, call)
