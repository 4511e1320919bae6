"""Mamba-3, single input and output (Lahoti et al., arXiv 2603.15569, §3).

    z, u, B, C, dt, a, m, theta = x W_in            Delta = softplus(dt + b), lambda = sigmoid(m) per head
    alpha_t = exp(-Delta_t max(softplus(a_t), 1e-4))
    phi_t   = phi_{t-1} + Delta_t pi tanh(theta_t)                 an angle per head and rotated pair
    q, k    = RMSNorm(C) + b_C, RMSNorm(B) + b_B, rotated by phi   norms per group, biases per head
    S_t     = alpha_t S_{t-1} + (1 - lambda_t) Delta_t alpha_t k_{t-1} u_{t-1}^T + lambda_t Delta_t k_t u_t^T
    y       = ((q_t S_t + D u_t) * silu(z)) W_O

This takes one call of the decay op. Its state W_t = S_t - lambda_t Delta_t k_t u_t^T has only the earlier tokens, and
each key enters it once.

    W_t     = alpha_t W_{t-1} + alpha_t (lambda_{t-1} Delta_{t-1} + (1 - lambda_t) Delta_t) k_{t-1} u_{t-1}^T

The rates are those of the released models; newer code of the authors replaces softplus(a) by 1 + a, and by 1 / (1 - a)
below 0. Phi is a float64 sum of increments that are computed in the dtype of states: in float32, it is off by up to
1e-3 after 16,384 tokens, equally in all paradigms. In a block with an FFN, W_O is divided by sqrt(n_layers) at
initialisation, as in Mamba-2 here. Multiple inputs and outputs (MIMO) are not supported.
"""

import math
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from ..ops.decay import decay
from ..ops.scan import SCAN_PARADIGMS, scan
from .base.roles import Role
from .base.traits import ContractError
from .parts import Call, GatedNorm, Paradigm
from .parts.rotary import Rotation, rotate
from .parts.state_space import StateSpaceConfig, StateSpaceMixer
from .parts.time_step import step_bias
from .parts.token_shift import token_shift

MIN_RATE = 1e-4
"""Lower limit of decay rates, which are multiplied by the step size Delta."""


class Mamba3Config(StateSpaceConfig):
    """Mamba-3: a matrix state per head, written by a trapezoidal rule, with keys rotated by angles from the tokens."""

    kind: Literal["mamba3"] = "mamba3"
    built_in = MappingProxyType(
        {"gate": "swish", "qk_norm": "rms of groups", "positions": "rotation by angles from the tokens"}
    )
    partial_rotary_factor: float = Field(default=0.5, gt=0, le=1, examples=[1.0])
    """Fraction of the key dimensions of a head that are rotated, in pairs, counted from the first."""
    head_norm: Literal["rms", "none"] = "none"
    """Norm of the output of each head, before the gate."""

    @classmethod
    def example_fields(cls) -> dict[str, Any]:
        """Return fields, by name, for small heads with a pair of dimensions to rotate."""
        return {"head_dim": 12, "d_state": 4}

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Mamba3":
        return Mamba3(self, d_model, n_layers)


class Mamba3State(NamedTuple):
    """State of Mamba-3 after a prefix."""

    memory: Float[Tensor, "B H K V"]
    """State matrix S of each head, float32 or float64."""
    recent: Float[Tensor, "B 1 H*(K+V)"]
    """Last rotated key and last value of each head."""
    angle: Float[Tensor, "B H A"]
    """Angle phi of each head and rotated pair, in radians; float64 and not reduced modulo 2 pi. Its error is that of
    the increments, which have the dtype of `memory`."""
    position: Int[Tensor, " B"]
    """Number of tokens processed."""


class Mamba3(StateSpaceMixer):
    """Layer configured by `Mamba3Config`."""

    def __init__(self, config: Mamba3Config, d_model: int, n_layers: int = 1) -> None:
        self.pairs = int(config.d_state * config.partial_rotary_factor / 2 + 1e-6)
        if not self.pairs:
            raise ContractError(
                "partial_rotary_factor * d_state must be >= 2, "
                f"got {config.partial_rotary_factor:g} * {config.d_state}: "
                "increase one of them"
            )
        gates = [("dt", None), ("a", None), ("share", None), ("angle", self.pairs)]
        super().__init__(config, d_model, n_layers, gates)
        # index 0 is for B, index 1 for C
        self.key_norm = nn.Parameter(torch.empty(2, self.key_dim))
        self.key_bias = nn.Parameter(torch.empty(2, self.n_heads, self.key_dim))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        own_roles = {"key_norm": Role.NORM, "key_bias": Role.VECTOR, "dt_bias": Role.RATE}
        self.parameter_roles = {**self.parameter_roles, **own_roles}
        norm = config.head_norm
        eps = config.norm_eps
        self.norm = GatedNorm(self.value_dim, norm, "swish", affine=True, eps=eps, heads=self.n_heads)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for ones in (self.key_norm, self.key_bias):
            nn.init.ones_(ones)
        uniform = torch.rand(self.dt_bias.shape, device=self.dt_bias.device)
        self.dt_bias.copy_(step_bias(uniform, self.config.time_step_range))

    def mix(  # pyright: ignore[reportIncompatibleMethodOverride] another state type
        self, x: Float[Tensor, "B T D"], call: Call
    ) -> tuple[Float[Tensor, "B T D"], Mamba3State | None]:
        wide = self.state_dtype
        by_head = (self.n_heads, -1)
        heads = self.n_heads
        values = self.widths[0]
        widths = [values, values, 2 * self.widths[1], 3 * heads, self.pairs]
        gate, u, bc, scalars, theta = self.in_proj(x).split(widths, dim=-1)
        gate, u, (dt, a, m) = gate.unflatten(-1, by_head), u.unflatten(-1, by_head), scalars.to(wide).split(heads, -1)
        _, recent, angle, position = call.state or (None,) * 4
        step = F.softplus(dt + self.dt_bias.to(wide))
        share = m.sigmoid()
        log_decay = -step * F.softplus(a).clamp(min=MIN_RATE)
        current_weight = share * step
        previous_weight = (1 - share) * step
        turn, angle = self.angles(step, theta.to(wide), angle, call)
        k, q = self.keys(bc, turn).to(u.dtype).unbind(2)
        # the previous token of each token, and the last token, which S contains and W does not
        last_k_u, last = token_shift(torch.cat((k, u), dim=-1).flatten(2), recent, call)
        weight, last_weight = token_shift(current_weight, None, call)
        k_before, u_before = last_k_u.unflatten(-1, by_head).split([self.key_dim, self.value_dim], dim=-1)
        k_before = ((log_decay.exp() * (weight + previous_weight))[..., None] * k_before).to(u.dtype)
        o, memory = decay(q, k_before, u_before, log_decay, call.enter("memory"), scale=1.0)
        skip = current_weight * (q.to(wide) * k).sum(-1) + self.D.to(wide)
        o = self.norm(o + (skip[..., None] * u).to(u.dtype), gate).to(u.dtype)
        y = self.out_proj(o.flatten(2))
        if memory is None or last is None or last_weight is None or angle is None:
            return y, None
        k, u = last.unflatten(-1, by_head)[:, 0].to(wide).split([self.key_dim, self.value_dim], dim=-1)
        memory = memory + last_weight[:, 0, :, None, None] * k[..., None] * u[..., None, :]
        return y, Mamba3State(memory, last.to(self.dtype), angle, call.advance(x, position))

    def angles(self, step: Tensor, theta: Tensor, before: Tensor | None, call: Call) -> tuple[Rotation, Tensor | None]:
        """Return cosine and sine of phi at every token, [B T H A], and phi after the last token."""
        increments = (step[..., None] * (math.pi * theta.tanh())[:, :, None]).double()
        if call.documents is None and call.cp_group is None:
            angle = increments.cumsum(1) if before is None else increments.cumsum(1) + before[:, None]
            last = angle[:, -1].clone() if call.return_state else None
        else:  # per document, or across ranks; every paradigm of the scan gives the same result
            paradigm = call.paradigm if call.paradigm in SCAN_PARADIGMS else Paradigm.CHUNKWISE
            angle, last = scan(increments, torch.zeros_like(increments), call._replace(paradigm=paradigm, state=before))
        angle = angle.remainder(2 * math.pi).to(step.dtype)
        return Rotation(angle.cos(), angle.sin()), last

    def keys(self, bc: Float[Tensor, "B T 2*G*K"], turn: Rotation) -> Float[Tensor, "B T 2 H K"]:
        """Return keys and queries after norm, bias and rotation."""
        x = bc.unflatten(-1, (2, self.n_groups, 1, self.key_dim)).to(self.state_dtype)
        norm = self.key_norm[:, None, None].to(x.dtype)
        bias = self.key_bias.to(x.dtype)
        x = F.rms_norm(x, x.shape[-1:], eps=self.config.norm_eps) * norm + bias.unflatten(1, (self.n_groups, -1))
        x = x.flatten(3, 4)
        turn = Rotation(turn.cos[:, :, None], turn.sin[:, :, None])
        return torch.cat((rotate(x[..., : 2 * self.pairs], turn), x[..., 2 * self.pairs :]), dim=-1)

    def init_state(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, batch_size: int, *, max_length: int | None = None
    ) -> Mamba3State:
        memory, _, position = super().init_state(batch_size)
        recent = memory.new_zeros(batch_size, 1, self.n_heads * (self.key_dim + self.value_dim), dtype=self.dtype)
        angle = memory.new_zeros(batch_size, self.n_heads, self.pairs, dtype=torch.float64)
        return Mamba3State(memory, recent, angle, position)
