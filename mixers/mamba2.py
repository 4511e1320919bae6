"""Mamba-2 (state space duality; Dao and Gu, arXiv 2405.21060, Eq. 2 and §7).

    z, (u, B, C), dt = x W_in
    u, B, C = silu(conv((u, B, C))) by channel      dt = softplus(dt + b) per head
    S_t = exp(-dt_t e^{A_log}) S_{t-1} + B_t^T (dt_t u_t)               o_t = C_t S_t + D u_t
    y   = (RMSNorm(o * silu(z)) * w) W_O

A head is the decay op with q = C, k = B, v = dt u and one decay per token. The heads of a group share B and C, and the
norm takes its mean over a group. As in the authors' code, the convolution has a bias, and A_log, D and b are one scalar
per head. Two differences: the limits of the step size apply in decoding too, and in a block with an FFN, W_O is divided
by sqrt(n_layers) at initialisation, where the authors' code divides by sqrt(2 n_layers).
"""

from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..ops.decay import decay
from .base.roles import Role
from .parts import Call, MatrixState, RecurrenceOutput, ShortConv, ShortConvolution, TimeStepDecay, TimeStepFields
from .parts.state_space import StateSpaceConfig, StateSpaceMixer


class Mamba2Config(StateSpaceConfig, TimeStepFields):
    """Mamba-2: a matrix state per head, with a decay and a step size that depend on the token."""

    kind: Literal["mamba2"] = "mamba2"
    built_in = MappingProxyType({"gate": "swish", "head_norm": "rms of groups, after the gate"})
    short_conv: ShortConv = 4

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Mamba2":
        return Mamba2(self, d_model, n_layers)


class Mamba2(StateSpaceMixer):
    """Layer configured by `Mamba2Config`. More layers make the initial output smaller, as in the authors' models."""

    silu_without_conv = True

    def __init__(self, config: Mamba2Config, d_model: int, n_layers: int = 1, **more: int) -> None:
        # one matrix product for the gate, the convolved values, B and C, the step sizes, and projections of subclasses
        super().__init__(config, d_model, n_layers, [("dt", None), *more.items()])
        self.convolution = ShortConvolution.of(config.short_conv, sum(self.widths), bias=True)
        self.decay = TimeStepDecay(self.n_heads, config.a_range, config.time_step_range, config.time_step_limit)
        self.norm_weight = nn.Parameter(torch.empty(self.widths[0]))
        self.parameter_roles = {**self.parameter_roles, "norm_weight": Role.NORM}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.norm_weight)

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], MatrixState | None]:
        gate, mixed, dt, *more = self.in_proj(x).split(self.in_widths, dim=-1)
        mixed, recent = self.convolve(mixed, call)
        u, k, q = mixed.split(self.widths, dim=-1)
        u = u.unflatten(-1, (self.n_heads, -1))
        o, memory = self.recur(self.by_group(q), self.by_group(k), u, dt, more, call)
        o = (o + self.D.to(u.dtype)[:, None] * u).flatten(2)
        # the product of output and gate, and its square even more so, can leave the range of float16
        gated = (o.to(self.state_dtype) * F.silu(gate.to(self.state_dtype))).unflatten(-1, (self.n_groups, -1))
        o = F.rms_norm(gated, gated.shape[-1:], eps=self.config.norm_eps).flatten(2).to(u.dtype)
        return self.out_proj(o * self.norm_weight.to(o.dtype)), self.state_after(x, memory, recent, call)

    def recur(
        self,
        q: Float[Tensor, "B T G K"],
        k: Float[Tensor, "B T G K"],
        u: Float[Tensor, "B T H V"],
        dt: Float[Tensor, "B T H"],
        more: list[Tensor],
        call: Call,
    ) -> RecurrenceOutput:
        """Compute the recurrence from `dt` and a subclass's own projections; return the output and the new `memory`."""
        del more
        step, log_decay = self.decay(dt)
        return decay(q, k, (step[..., None] * u).to(u.dtype), log_decay, call.enter("memory"), scale=1.0)
