"""Mamba-2 (state space duality; Dao and Gu, arXiv 2405.21060, Eq. 2 and §7).

    z, (u, B, C), dt = x W_in
    u, B, C = silu(conv((u, B, C))) by channel      dt = softplus(dt + b) a head
    S_t = exp(-dt_t e^{A_log}) S_{t-1} + B_t^T (dt_t u_t)               o_t = C_t S_t + D u_t
    y   = (RMSNorm(o * silu(z)) * w) W_O

The decay is one number for each token and head, so a head is the decay op with q = C, k = B and v = dt u. The heads of
a group share B and C, and the norm takes its mean over a group. As in the authors' code, the convolution has a bias,
and A_log, D and b are a number a head. Differs from it: segments of any length start from a state, and limits of the
step size hold in decoding too.
"""

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor, nn

from ..ops.call import Call
from ..ops.decay import DECAY, decay
from .parts import MatrixState, MatrixStateConfig, MatrixStateMixer, ShortConvolution, TimeStepDecay, in_range
from .parts.widths import divided, divisors, nearest_of
from .traits import ContractError

Limit = tuple[float, Annotated[float, Field(allow_inf_nan=True)] | None]


class Mamba2Config(MatrixStateConfig):
    """Mamba-2: a matrix state per head, whose decay and step size depend on the token."""

    family = DECAY
    kind: Literal["mamba2"] = "mamba2"
    expand: float = Field(default=2.0, gt=0, le=1000, examples=[1.0])
    """Width of all values (and the gate) over d_model."""
    head_dim: int = Field(default=64, gt=0, le=2**20, examples=[6, 12, 24])
    """Width of a head's values; there are expand * d_model / head_dim heads."""
    d_state: int = Field(default=128, gt=0, le=2**20, examples=[5, 1])
    """Width of a head's keys B and queries C."""
    n_groups: int = Field(default=1, gt=0, le=2**20, examples=[2])
    """Groups of heads; those of one share B and C, and are normed together."""
    short_conv: int = Field(default=4, ge=2, le=64, examples=[2])
    """Tokens that the short convolution sees."""
    time_step_range: Annotated[tuple[float, float], in_range(1e-6, 1e3)] = Field(default=(1e-3, 0.1), strict=False)
    """Step sizes at the start lie between these two, evenly in their logarithm (where the input adds nothing). From
    1e-6 to 1e3; the authors' code raises those below 1e-4 to that."""
    time_step_limit: Limit | None = Field(default=None, strict=False, examples=[(2e-3, 0.1)])
    """Step sizes are clamped to these two, of at most 1e3; .inf or null as the upper for none, null for neither."""
    a_range: Annotated[tuple[float, float], in_range(1e-6, 1e6)] = Field(default=(1.0, 16.0), strict=False)
    """Decay rates e^{A_log} at the start lie evenly between these two; from 1e-6 to 1e6."""
    norm_eps: float = Field(default=1e-5, ge=0)
    """Added to the norm's mean square."""

    @field_validator("time_step_limit")
    @classmethod
    def _limit_is_a_range(cls, given: tuple[float, float | None] | None) -> tuple[float, float | None] | None:
        if given is None:
            return None
        low, high = given[0], math.inf if given[1] is None else given[1]
        if not (0 <= low <= 1e3 and low < high and (high <= 1e3 or high == math.inf)):
            raise ValueError(
                f"limits of the step size need 0 <= lowest < highest <= 1000, or .inf for no highest, and are {given}"
            )
        return low, None if high == math.inf else high  # JSON has no infinity

    @classmethod
    def example_fields(cls) -> dict[str, Any]:
        """Small heads: with the default ones, the smallest model would be 32 wide."""
        return {"head_dim": 6, "d_state": 5}

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Mamba2":
        return Mamba2(self, d_model, n_layers)


class Mamba2(MatrixStateMixer):
    """The layer of `Mamba2Config`; `n_layers` makes the output small at the start, as the authors' models do."""

    log_decay_shape = "B T H"

    def __init__(self, config: Mamba2Config, d_model: int, n_layers: int = 1) -> None:
        super().__init__(config)
        self.config, self.n_layers, self.n_groups = config, n_layers, config.n_groups
        subject = f"heads of head_dim = {config.head_dim} do"
        self.n_heads = divided(d_model, config.expand, "expand", config.head_dim, "head_dim", subject)
        if self.n_heads % config.n_groups:
            raise ContractError(
                f"n_groups = {config.n_groups} does not divide the {self.n_heads} heads of expand * d_model / "
                f"head_dim: n_groups = {nearest_of(divisors(self.n_heads), config.n_groups)} would"
            )
        self.key_dim, self.value_dim = config.d_state, config.head_dim
        values, keys = self.n_heads * config.head_dim, config.n_groups * config.d_state
        self.widths = [values, keys, keys]
        # one product for gate, what is convolved (values, B, C) and step sizes
        self.in_widths = [values, sum(self.widths), self.n_heads]
        self.in_proj = nn.Linear(d_model, sum(self.in_widths), bias=False)
        self.convolution = ShortConvolution(sum(self.widths), config.short_conv, bias=True)
        self.decay = TimeStepDecay(self.n_heads, config.a_range, config.time_step_range, config.time_step_limit)
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm_weight = nn.Parameter(torch.empty(values))
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the authors' code: torch's own for the projections, that of the output over sqrt(n_layers)."""
        for part in (self.in_proj, self.convolution, self.out_proj, self.decay):
            part.reset_parameters()
        self.out_proj.weight.div_(math.sqrt(self.n_layers))
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm_weight)

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], MatrixState | None]:
        gate, mixed, dt = self.in_proj(x).split(self.in_widths, dim=-1)
        mixed, recent = self.convolve(mixed, call)
        u, k, q = mixed.split(self.widths, dim=-1)
        u = u.unflatten(-1, (self.n_heads, -1))
        step, log_decay = self.decay(dt)
        v = (step[..., None] * u).to(u.dtype)
        o, memory = decay(self._by_head(q), self._by_head(k), v, log_decay, call.enter("memory"), scale=1.0)
        o = (o + self.D.to(u.dtype)[:, None] * u).flatten(2)
        # a product of the output and the gate can leave the range of float16, and its square sooner
        gated = (o.to(self.state_dtype) * F.silu(gate.to(self.state_dtype))).unflatten(-1, (self.n_groups, -1))
        o = F.rms_norm(gated, gated.shape[-1:], eps=self.config.norm_eps).flatten(2).to(u.dtype)
        return self.out_proj(o * self.norm_weight.to(o.dtype)), self.state_after(x, memory, recent, call)

    def _by_head(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T H K"]:
        """B or C, the same for the heads of a group: a view where there is one group."""
        x = rearrange(x, "b t (g k) -> b t g 1 k", g=self.n_groups)
        return x.expand(-1, -1, -1, self.n_heads // self.n_groups, -1).flatten(2, 3)
