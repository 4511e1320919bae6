"""Preconditioned delta rules: keys that write are scaled by how much was written (arXiv 2604.21100).

    A_t = exp(a_t) A_{t-1} + b_t k_t^2          curvature, one number per key dimension
    r_t = log(A_t + eps) - c                    c: one parameter per key head
    m_t = x^(-r_t / (1 + |r_t|))                factor, from 1/x to x

The layer writes with m_t k_t and reads with k_t. b_t = sigmoid(.) and a_t, a log-decay as in `time_step.py`, are one
scalar per key head, each with a projection of its own. As in the authors' code, x is 1.5, and c starts at -0.2.
"""

import math
from typing import Any, ClassVar, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...ops.delta import delta
from ...ops.dplr import DPLR, dplr
from ...ops.recurrence.family import RecurrenceOutput
from ...ops.runtime.call import Call
from ...ops.scan import scan
from ..base.layer_call import Mixed
from ..base.roles import Role, Roles
from .qkv import QKV, QKVMixer
from .time_step import TimeStepDecay

EPS = 1e-6
"""Constant added to the curvature, whose logarithm is taken."""


class Preconditioner(nn.Module):
    """Factors m of the keys that write.

    Args:
        n_heads: number of key heads.
        bound: bound x of the factors.
        rates: range of the initial decay rates of the curvature.
    """

    parameter_roles: ClassVar[Roles] = {"center": Role.RATE}

    def __init__(self, n_heads: int, bound: float, rates: tuple[float, float]) -> None:
        super().__init__()
        self.bound = bound
        self.decay = TimeStepDecay(n_heads, rates)
        self.center = nn.Parameter(torch.empty(n_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the decays as those of the layer, and c as -0.2."""
        self.decay.reset_parameters()
        nn.init.constant_(self.center, -0.2)

    def set_reach(self, tokens: Float[Tensor, " H"]) -> list[str]:
        """Set the decays of the curvature, each to the longest reach of the heads that share its key head."""
        self.decay.set_reach(tokens.unflatten(0, (len(self.center), -1)).amax(1))
        return ["decay.dt_bias"]

    def forward(
        self, k: Float[Tensor, "B T G K"], rate: Float[Tensor, "B T G"], dt: Float[Tensor, "B T G"], call: Call
    ) -> tuple[Float[Tensor, "B T G K"], Float[Tensor, "N G K"] | None]:
        """Return the factors, and the curvature after the segment (None unless requested), float32 or float64."""
        _, log_decay = self.decay(dt)
        wide = log_decay.dtype
        squares = rate.to(wide).sigmoid()[..., None] * k.to(wide).square()
        curvature, final = scan(squares, log_decay[..., None].expand_as(squares).contiguous(), call)
        r = (curvature + EPS).log() - self.center.to(wide)[:, None]
        return (-math.log(self.bound) * r / (1 + r.abs())).exp(), final


class PreconditionedState(NamedTuple):
    """State of a preconditioned delta rule after a prefix: a matrix per head, and the curvature per key head."""

    memory: Float[Tensor, "B H K V"]
    """State matrix S of each head, float32 or float64."""
    curvature: Float[Tensor, "B G K"]
    """Decayed sum A of squared keys of each key head, float32 or float64."""
    recent: Float[Tensor, "B W-1 C"]
    """Last inputs of the short convolution, oldest first; empty without a short convolution."""
    position: Int[Tensor, " B"]
    """Number of tokens processed."""


class PreconditionedMixer(QKVMixer):
    """A mixer of the delta family with the option `precondition`; a subclass calls `update` in `recur`.

    Args:
        config: the mixer's configuration.
        d_model: width of the residual stream.
        rates: range of the initial decay rates of the curvature.
        more: widths of further projections by name.
    """

    def __init__(self, config: Any, d_model: int, *, rates: tuple[float, float] = (0.0, 16.0), **more: int) -> None:
        bound: float | None = getattr(config, "precondition", None)
        key_heads = getattr(config, "n_qk_heads", None) or config.n_heads
        if bound is not None:
            more |= {"curvature_rate": key_heads, "curvature_dt": key_heads}
        super().__init__(config, d_model, **more)
        self.preconditioner = None if bound is None else Preconditioner(key_heads, bound, rates)
        if bound is not None:
            self.family = DPLR

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> Mixed[Any]:
        if self.preconditioner is None:
            return super().mix(x, call)
        h = self.project(x, call)
        heads_per_key = self.n_heads // self.n_qk_heads
        rate, dt = (h.more[name] for name in ("curvature_rate", "curvature_dt"))
        factors, curvature = self.preconditioner(h.k[:, :, ::heads_per_key], rate, dt, call.enter("curvature"))
        h = h._replace(more=h.more | {"factors": factors.repeat_interleave(heads_per_key, dim=2)})
        o, memory = self.recur(x, h, call.enter("memory"))
        y, after = self.project_out(x, h, o, memory, call)
        if after is not None and curvature is not None:
            after = PreconditionedState(after.memory, curvature, after.recent, after.position)
        return self.with_own_values(y, cast("Any", after), h.own_values)

    def update(self, h: QKV, beta: Float[Tensor, "B T H"], log_decay: Tensor, call: Call) -> RecurrenceOutput:
        """Compute the delta rule with a decay, in which the keys that write have their factors."""
        factors = h.more.get("factors")
        if factors is None:
            return delta(h.q, h.k, h.v, beta, log_decay, call)
        writes = (beta[..., None] * factors * h.k).to(h.k.dtype)
        return dplr(h.q, writes, h.v, h.k, None, log_decay, call)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> Any:
        state = super().init_state(batch_size)
        if self.preconditioner is None:
            return state
        curvature = state.memory.new_zeros(batch_size, self.n_qk_heads, self.key_dim)
        return PreconditionedState(state.memory, curvature, state.recent, state.position)
