"""Mamba-3, single input and output (Lahoti et al., arXiv 2603.15569, §3).

    z, u, B, C, dt, a, m, theta = x W_in            Delta = softplus(dt + b), lambda = sigmoid(m) per head
    alpha_t = exp(-Delta_t max(softplus(a_t), 1e-4))
    phi_t   = phi_{t-1} + Delta_t pi tanh(theta_t)                 an angle per head, of each pair that turns
    q, k    = RMSNorm(C) + b_C, RMSNorm(B) + b_B, turned by phi    the norms are a group's, the biases a head's
    S_t     = alpha_t S_{t-1} + (1 - lambda_t) Delta_t alpha_t k_{t-1} u_{t-1}^T + lambda_t Delta_t k_t u_t^T
    y       = ((q_t S_t + D u_t) * silu(z)) W_O

One call of the decay op: W_t = S_t - lambda_t Delta_t k_t u_t^T is all of earlier tokens, and takes a key only once,

    W_t     = alpha_t W_{t-1} + alpha_t (lambda_{t-1} Delta_{t-1} + (1 - lambda_t) Delta_t) k_{t-1} u_{t-1}^T

The rates are those of the released models; newer code of the authors has 1 + a, and 1 / (1 - a) below 0, for softplus.
Beside an FFN W_O starts over sqrt(n_layers), as our Mamba-2's. Several inputs and outputs (MIMO) are missing.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from ..ops.decay import decay
from ..ops.scan import SCAN_PARADIGMS, scan
from .parts import Call, GatedNorm, Paradigm
from .parts.rotary import Rotation, rotate
from .parts.state_space import StateSpaceConfig, StateSpaceMixer
from .parts.time_step import step_bias
from .parts.token_shift import token_shift
from .traits import ContractError

RATE = 1e-4
"""Of a decay, at least."""


class Mamba3Config(StateSpaceConfig):
    """Mamba-3: a matrix state per head, written by a trapezoidal rule, whose keys turn by angles of the tokens."""

    kind: Literal["mamba3"] = "mamba3"
    partial_rotary_factor: float = Field(default=0.5, gt=0, le=1, examples=[1.0])
    """The share of a head's key dimensions that turn, in pairs: the first of them."""
    head_norm: Literal["rms", "none"] = "none"
    """The norm of each head's output before the gate."""

    @classmethod
    def example_fields(cls) -> dict[str, Any]:
        """Small heads with a pair to turn."""
        return {"head_dim": 12, "d_state": 4}

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Mamba3":
        return Mamba3(self, d_model, n_layers)


class Mamba3State(NamedTuple):
    """The state after a prefix."""

    memory: Float[Tensor, "B H K V"]
    """S, float32 or float64."""
    recent: Float[Tensor, "B 1 H*(K+V)"]
    """The last turned key and value of each head."""
    angle: Float[Tensor, "B H A"]
    """phi, float64 and as large as it gets: 16 digits last for as many tokens as there are."""
    position: Int[Tensor, " B"]
    """Tokens processed."""


class Mamba3(StateSpaceMixer):
    """The layer of `Mamba3Config`."""

    def __init__(self, config: Mamba3Config, d_model: int, n_layers: int = 1) -> None:
        self.pairs = int(config.d_state * config.partial_rotary_factor / 2 + 1e-6)
        if not self.pairs:
            raise ContractError(f"no pair of d_state = {config.d_state} turns: make partial_rotary_factor larger")
        super().__init__(config, d_model, n_layers, None, None, None, self.pairs)
        # of B and C
        self.key_norm = nn.Parameter(torch.empty(2, self.key_dim))
        self.key_bias = nn.Parameter(torch.empty(2, self.n_heads, self.key_dim))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
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

    def mix(  # pyright: ignore[reportIncompatibleMethodOverride] a state with another leaf
        self, x: Float[Tensor, "B T D"], call: Call
    ) -> tuple[Float[Tensor, "B T D"], Mamba3State | None]:
        wide = self.state_dtype
        by_head = (self.n_heads, -1)
        heads = self.n_heads
        values = self.widths[0]
        widths = [values, values, 2 * self.widths[1], 3 * heads, self.pairs]
        gate, u, bc, scalars, theta = self.in_proj(x).split(widths, dim=-1)
        gate, u, (dt, a, mix) = gate.unflatten(-1, by_head), u.unflatten(-1, by_head), scalars.to(wide).split(heads, -1)
        _, recent, angle, position = call.state or (None,) * 4
        step = F.softplus(dt + self.dt_bias.to(wide))
        share = mix.sigmoid()
        log_decay = -step * F.softplus(a).clamp(min=RATE)
        own = share * step
        older = (1 - share) * step
        turn, angle = self.angles(step, theta.to(wide), angle, call)
        k, q = self.keys(bc, turn).to(u.dtype).unbind(2)
        # the token before each, and the last one, of which S has what W has not
        last_k_u, last = token_shift(torch.cat((k, u), dim=-1).flatten(2), recent, call)
        weight, last_weight = token_shift(own, None, call)
        k_before, u_before = last_k_u.unflatten(-1, by_head).split([self.key_dim, self.value_dim], dim=-1)
        k_before = ((log_decay.exp() * (weight + older))[..., None] * k_before).to(u.dtype)
        o, memory = decay(q, k_before, u_before, log_decay, call.enter("memory"), scale=1.0)
        read = own * (q.to(wide) * k).sum(-1) + self.D.to(wide)
        o = self.norm(o + (read[..., None] * u).to(u.dtype), gate).to(u.dtype)
        y = self.out_proj(o.flatten(2))
        if memory is None or last is None or last_weight is None or angle is None:
            return y, None
        k, u = last.unflatten(-1, by_head)[:, 0].to(wide).split([self.key_dim, self.value_dim], dim=-1)
        memory = memory + last_weight[:, 0, :, None, None] * k[..., None] * u[..., None, :]
        return y, Mamba3State(memory, last.to(self.dtype), angle, call.advance(x, position))

    def angles(self, step: Tensor, theta: Tensor, before: Tensor | None, call: Call) -> tuple[Rotation, Tensor | None]:
        """Cosine and sine of phi at every token, [B T H A], and phi after the last one."""
        turned = (step[..., None] * (math.pi * theta.tanh())[:, :, None]).double()
        if call.documents is None and call.cp_group is None:
            angle = turned.cumsum(1) if before is None else turned.cumsum(1) + before[:, None]
            last = angle[:, -1].clone() if call.return_state else None
        else:  # of each document, or over ranks; any way to compute it is one map
            paradigm = call.paradigm if call.paradigm in SCAN_PARADIGMS else Paradigm.CHUNKWISE
            angle, last = scan(turned, torch.zeros_like(turned), call._replace(paradigm=paradigm, state=before))
        angle = angle.remainder(2 * math.pi).to(step.dtype)
        return Rotation(angle.cos(), angle.sin()), last

    def keys(self, bc: Float[Tensor, "B T 2*G*K"], turn: Rotation) -> Float[Tensor, "B T 2 H K"]:
        """Keys and queries: normed, biased, turned."""
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
