"""Real-gated linear recurrent unit, RG-LRU, in the recurrent block of Griffin (De et al., arXiv 2402.19427, §2.3
and 2.4).

    u, g = x W_u + b_u, x W_g + b_g          u = conv(u) by channel
    r_t = sigmoid(u_t W_r + b_r)             i_t = sigmoid(u_t W_i + b_i)        W_r, W_i block-diagonal by head
    a_t = exp(-8 softplus(Lambda) r_t)       one scalar per channel
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t)
    y   = (h * gelu(g)) W_o + b_o

As in the authors' code, the first token of a document is written without sqrt(1 - a^2) (`unit_start`), and gelu is its
tanh approximation. Three differences from the authors' code:

- It clips the gradient of the square root at 1e3. Here the function is sqrt(v) down to v = 2.5e-7, and below that a
  line through 0, which is at most 1.25e-4 below the root.
- Initial decays with open gates are evenly spaced in `a_range`, as in the paper. There they are the 8th powers of such
  numbers, with evenly spaced squares: from 0.43 to 0.99.
- There, filters start with a variance of 0.01 over their width, and W_o with 2 / n_layers times that of LeCun-normal.
"""

from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.scan import scan
from .base.roles import Role, RowBlock
from .base.traits import Traits
from .parts import Call, ShortConvolution
from .parts.scan_state import ScanConfig, ScanMixer, ScanState
from .parts.time_step import in_range
from .parts.widths import head_width

SHARPNESS = 8.0
"""Constant c = 8 of the paper, by which log-decays are multiplied."""
LINEAR_BELOW = 2.5e-7
"""Value of 1 - a^2 below which its square root is replaced by a line."""


class RGLRUConfig(ScanConfig):
    """RG-LRU: one scalar per channel as the state, with a decay that depends on the token."""

    kind: Literal["rg_lru"] = "rg_lru"
    built_in = MappingProxyType({"gate": "gelu"})
    n_heads: int = Field(gt=0, examples=[2, 1, 3])
    """Number of blocks in the block-diagonal matrices of the gates."""
    expand: float = Field(default=1.0, gt=0, le=1000, examples=[2.0])
    """Number of channels of the recurrence, divided by d_model."""
    short_conv: int = Field(default=4, gt=0, le=64, examples=[2])
    """Width of the short convolution in tokens."""
    a_range: Annotated[tuple[float, float], in_range(1e-6, 1 - 1e-6)] = Field(default=(0.9, 0.999), strict=False)
    """Range of the initial decays with open gates, exp(-8 softplus(Lambda)), evenly spaced; from 1e-6 to 1 - 1e-6."""
    unit_start: bool = True
    """True if the first token of a document is written without the factor sqrt(1 - a^2)."""

    @property
    def traits(self) -> Traits:
        """Traits of the scan family; with `unit_start`, the output depends on which token is the first."""
        return replace(super().traits, shift_invariant=not self.unit_start)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "RGLRU":
        return RGLRU(self, d_model)


class RGLRU(ScanMixer):
    """Layer configured by `RGLRUConfig`."""

    op = "scan"

    def __init__(self, config: RGLRUConfig, d_model: int) -> None:
        block = head_width(d_model, config.expand, config.n_heads, "expand")
        self.width = block * config.n_heads
        super().__init__(config, self.width)
        self.in_proj = nn.Linear(d_model, 2 * self.width)
        self.convolution = ShortConvolution(self.width, config.short_conv, bias=True, activation="none")
        self.gate_weight = nn.Parameter(torch.empty(config.n_heads, block, 2 * block))
        self.gate_bias = nn.Parameter(torch.empty(config.n_heads, 2 * block))
        self.rate = nn.Parameter(torch.empty(self.width))
        self.parameter_roles = {
            "in_proj.weight": [RowBlock("v", self.width), RowBlock("gate", self.width)],
            "gate_weight": Role.GATE,
            "gate_bias": Role.RATE,
            "rate": Role.RATE,
        }
        self.out_proj = nn.Linear(self.width, d_model)
        self.products = self.gate_weight.numel()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the paper: LeCun-normal matrices, biases of 0, and decays in the range `a_range`."""
        super().reset_parameters()
        for layer in (self.in_proj, self.out_proj):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.gate_weight, std=self.gate_weight.shape[1] ** -0.5)
        nn.init.zeros_(self.gate_bias)
        low, high = self.config.a_range
        decays = low + (high - low) * torch.rand_like(self.rate, dtype=torch.float64)
        self.rate.copy_(torch.expm1(-decays.log() / SHARPNESS).log())  # the inverse of softplus

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], ScanState | None]:
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u, recent = self.convolve(u, call)
        by_head = u.unflatten(-1, (self.config.n_heads, -1))
        logits = torch.einsum("bthi,hij->bthj", by_head, self.gate_weight.to(u.dtype)).to(self.state_dtype)
        r, i = (logits + self.gate_bias.to(logits.dtype)).sigmoid().chunk(2, dim=-1)
        log_decay = -SHARPNESS * F.softplus(self.rate.to(logits.dtype)) * r.flatten(2)
        input_scale = _sqrt(-torch.expm1(2 * log_decay))
        if self.config.unit_start:
            first = call.positions(x, None if call.state is None else call.state.position) == 0
            input_scale = torch.where(first[..., None], 1.0, input_scale)
        h, memory = scan(input_scale * i.flatten(2) * u.to(logits.dtype), log_decay, call.enter("memory"))
        y = self.out_proj((h * F.gelu(gate.to(h.dtype), approximate="tanh")).to(u.dtype))
        return y, self.state_after(x, memory, recent, call)


def _sqrt(v: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Return the square root of numbers from 0 to 1, with a slope of at most 2,000."""
    return v * v.clamp(min=LINEAR_BELOW).rsqrt()
