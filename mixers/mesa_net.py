"""MesaNet: linear attention with an optimal regression at every token (von Oswald et al., arXiv 2506.05233, §3).

    q, k = silu(conv(x W_Q)), silu(conv(x W_K)) by head, divided by their norms       v = x W_V
    beta_t, alpha_t = sigmoid(x_t W_b + b_b), sigmoid(x_t W_a + b_a)                  one scalar each per head
    G_t = alpha_t G_{t-1} + beta_t k_t k_t^T            S_t = alpha_t S_{t-1} + beta_t k_t v_t^T
    o_t = ((G_t + diag(lambda))^-1 q_t) S_t             lambda = 0.25 + softplus(w)   per key dimension, 1 at first
    y   = RMSNorm(o) W_O                                the norm is per head, its weights are shared by all heads

o_t = q_t W_t, where W_t minimises the sum over all tokens so far of their decayed beta_i |v_i - k_i W|^2, plus the sum
of lambda W^2: the delta rule takes one step towards it, MesaNet goes there.

The systems are solved by conjugate gradients (ops/ridge.py). By default they take at most four iterations more than a
key has dimensions, so that they converge, and gradients are exact. With a number of `iterations`, as in the authors'
models (30 for 128 dimensions), the output is still the same in all paradigms, but gradients are derived as if they had
converged: the mixer then declares surrogate gradients. G and S are always float32 or wider: in 16 bits, G would not
stay positive definite.

Projections, gates and their start are those of fla's layer. Its solver differs: it adds 1e-5 to the denominators of an
iteration, and in decoding it starts at q / (diag(G) + lambda), not at 0. Outputs of size 1 differ by up to 2e-2 in
decoding with three iterations, and by about 1e-3 where both solvers have converged.
"""

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..ops.decay import decay
from ..ops.ridge import ridge_flops, ridge_solve
from .base.roles import Role
from .base.traits import Traits
from .parts import QKV, Call, Paradigm, QKVConfig, QKVMixer, RecurrenceOutput, ShortConv
from .parts.qkv import Affine, OutputGate

CONVERGENCE = 4
"""Iterations beyond the width of a key, after which rounding errors have gone too."""
FIRST_RIDGE = 1.0
"""Value of lambda at initialisation."""


class MesaNetConfig(QKVConfig):
    """MesaNet: two matrices per head, keys and values by keys, whose quotient is read: a regression at every token."""

    kind: Literal["mesa_net"] = "mesa_net"
    short_conv: ShortConv = 4
    qk_norm: Literal["l2"] = "l2"  # pyright: ignore[reportIncompatibleVariableOverride] narrower type
    """Norm of queries and keys; always `l2`."""
    rotation: Literal["none"] = "none"  # pyright: ignore[reportIncompatibleVariableOverride] narrower type
    """Always `none`: a ridge that differs within a pair of dimensions does not commute with rotating the pair."""
    gate: OutputGate = "none"
    norm_affine: Affine = True
    norm_eps: float = Field(default=1e-5, ge=0)
    """Constant added to the mean square in the output norm."""
    iterations: int | None = Field(default=None, gt=0, le=10_000, examples=[3])
    """Iterations of conjugate gradients; null for four more than a key has dimensions, which converge."""
    min_ridge: float = Field(default=0.25, gt=0, lt=FIRST_RIDGE)
    """Lower bound of lambda, which starts at 1."""
    chunk_size: int = Field(default=64, gt=0, le=2**20)
    """Chunk length in tokens; changes the cost, never the result."""

    @property
    def traits(self) -> Traits:
        """Traits of the decay family; gradients are exact if the iterations converge."""
        return replace(super().traits, surrogate_gradients=self.iterations is not None)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "MesaNet":
        return MesaNet(self, d_model)


class MesaNet(QKVMixer):
    """Layer configured by `MesaNetConfig`. The leaf `memory` of its state has G and S side by side, [B H K K+V]."""

    log_decay_shape = "B T H"
    silu_without_conv = True
    convolves_values = False
    supports_context_parallel = False  # the solver reads the state before its segment

    def __init__(self, config: MesaNetConfig, d_model: int) -> None:
        super().__init__(config, d_model, beta=config.n_heads, decay=config.n_heads)
        self.iterations = config.iterations or self.key_dim + CONVERGENCE
        self.ridge = nn.Parameter(torch.empty(self.n_heads, self.key_dim))
        self.gate_bias = nn.Parameter(torch.empty(2, self.n_heads))
        self.parameter_roles = {**self.parameter_roles, "ridge": Role.RATE, "gate_bias": Role.RATE}
        self.value_dim += self.key_dim  # the width of the state, with G
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "ridge"):  # not yet in the constructor of the base class
            rest = torch.full_like(self.ridge, FIRST_RIDGE - self.config.min_ridge, dtype=torch.float64)
            self.ridge.copy_(torch.expm1(rest).log())  # the inverse of softplus
            nn.init.zeros_(self.gate_bias)

    def recur(self, x: Tensor, h: QKV, call: Call) -> RecurrenceOutput:
        bias = self.gate_bias.to(h.q.dtype)
        beta = (h.more["beta"].to(h.q.dtype) + bias[0]).sigmoid()
        log_decay = F.logsigmoid(h.more["decay"].to(h.q.dtype) + bias[1])
        ridge = self.config.min_ridge + F.softplus(self.ridge.to(h.q.dtype))
        keys = call if call.state is None else call._replace(state=call.state[..., : self.key_dim])
        read = ridge_solve(h.q, h.k, beta, log_decay, ridge, self.iterations, keys)
        o, memory = decay(read, beta[..., None] * h.k, torch.cat((h.k, h.v), dim=-1), log_decay, call, scale=1.0)
        return RecurrenceOutput(o[..., self.key_dim :], memory)

    def op_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return float32 or float64: in 16 bits, G would not stay positive definite."""
        return torch.promote_types(dtype, torch.float32)

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        solver = ridge_flops(paradigm, length, self.key_dim, self.iterations, chunk_size=self.chunk_size)
        return super().flops(length, paradigm, context) + self.n_heads * solver
