"""Log-linear attention on Mamba-2's decays (Guo et al., arXiv 2506.04761).

    z, (u, B, C), dt, d = x W_in
    u, B, C, dt as in Mamba-2               lambda_tl = softplus(L_l d_tl)   per head and level, L learned, 1 at first
    S_t^l   the part of Mamba-2's state that stems from the tokens of level l
    o_t     = sum_l lambda_tl C_t S_t^l + D u_t
    y       = (RMSNorm(o * silu(z)) * w) W_O

Level 0 is the token itself. Level l >= 1 has 2^(l-1) tokens, and exists if bit l - 1 of the position is 1, so that a
token reads a state per bit of its position: the nearest tokens share a short one, the oldest the longest. With all
lambda equal to 1 this is Mamba-2. The number of levels bounds the length, to 2^(levels - 1) tokens; longer texts are
refused. Levels depend on positions, so the output does too.

The paper also has a form on the gated delta rule, which is not supported. Everything but the levels is as in `mamba2`
here, with a bias in the convolution, as in the authors' models. In their code and in fla's, the decay rates start at 1,
2, ..., H instead. By default, fla's layer has biases in the projections, and none in the convolution.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from ..ops.fenwick import log_linear, log_linear_flops
from ..ops.runtime.packing import require_async
from .base.roles import Role
from .base.traits import ContractError, Traits
from .mamba2 import Mamba2, Mamba2Config
from .parts import Call, Paradigm, RecurrenceOutput
from .parts.widths import heads_of


class LogLinearConfig(Mamba2Config):
    """Log-linear attention: Mamba-2 with a state matrix per bit of the position, weighted by factors of the token."""

    kind: Literal["log_linear"] = "log_linear"  # pyright: ignore[reportIncompatibleVariableOverride] another kind
    levels: int = Field(default=15, ge=12, le=32)
    """Number of levels; a sequence has at most 2^(levels - 1) tokens."""
    backend: Literal["auto", "reference", "native"] = "auto"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Kernel backend of the short convolution, the only part with kernels; changes the cost, never the result."""
    chunk_size: int = Field(default=64, gt=0, le=2**20)
    """Chunk length in tokens; changes the cost, never the result."""

    @property
    def traits(self) -> Traits:
        """Traits of Mamba-2, except that the output depends on positions."""
        return replace(super().traits, shift_invariant=False)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "LogLinear":
        return LogLinear(self, d_model, n_layers)


class LogLinearState(NamedTuple):
    """State of log-linear attention after a prefix."""

    memory: Float[Tensor, "B H L K V"]
    """State matrix of each head and level from 1 on, float32 or float64; zero where the position's bit is 0."""
    recent: Float[Tensor, "B W-1 C"]
    """Last inputs of the short convolution, oldest first; empty without a short convolution."""
    position: Int[Tensor, " B"]
    """Number of tokens processed."""


class LogLinear(Mamba2):
    """Layer configured by `LogLinearConfig`."""

    supports_context_parallel = False  # levels of a segment depend on the states before it

    def __init__(self, config: LogLinearConfig, d_model: int, n_layers: int = 1) -> None:
        self.levels = config.levels
        heads = heads_of(d_model, config.expand, config.head_dim, config.n_groups)
        super().__init__(config, d_model, n_layers, level=heads * config.levels)
        self.level_rate = nn.Parameter(torch.empty(self.n_heads, config.levels))
        self.parameter_roles = {**self.parameter_roles, "level_rate": Role.RATE}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "level_rate"):  # not yet in the constructor of the base class
            nn.init.ones_(self.level_rate)

    def mix(  # pyright: ignore[reportIncompatibleMethodOverride] another state type
        self, x: Float[Tensor, "B T D"], call: Call
    ) -> tuple[Float[Tensor, "B T D"], LogLinearState | None]:
        self._require_positions(x, call)
        y, state = super().mix(x, call)
        return y, None if state is None else LogLinearState(*state)

    def recur(
        self,
        q: Float[Tensor, "B T G K"],
        k: Float[Tensor, "B T G K"],
        u: Float[Tensor, "B T H V"],
        dt: Float[Tensor, "B T H"],
        more: list[Tensor],
        call: Call,
    ) -> RecurrenceOutput:
        wide = self.state_dtype
        step, log_decay = self.decay(dt)
        v = (step[..., None] * u).to(u.dtype)
        scales = F.softplus(more[0].to(wide).unflatten(-1, (self.n_heads, -1)) * self.level_rate.to(wide))
        position = None if call.state is None else call.state.position
        return RecurrenceOutput(*log_linear(q, k, v, log_decay, scales, position, call.enter("memory")))

    def _require_positions(self, x: Tensor, call: Call) -> None:
        """Refuse texts that are longer than the levels allow.

        Raises:
            ContractError: they are, in eager code on a CPU.
            RuntimeError: they are, elsewhere; an exported graph does not check it.
        """
        limit = 1 << (self.levels - 1)
        after = call.advance(x, None if call.state is None else call.state.position)
        # a subclass has no values to read: a tensor of a compiler, or of a count of memory
        if x.device.type == "cpu" and type(after) is Tensor and not torch.compiler.is_compiling():
            if (length := int(after.max())) > limit:
                raise ContractError(
                    f"log_linear with levels = {self.levels} reads at most {limit} tokens, got {length}: "
                    f"set levels = {(length - 1).bit_length() + 1}"
                )
        elif x.device.type != "meta" and not torch.compiler.is_exporting():
            require_async((after <= limit).all(), "log_linear reads at most 2^(levels - 1) tokens: increase levels")

    def kernels(self, dtype: torch.dtype) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] no kernels
        return None

    def init_state(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, batch_size: int, *, max_length: int | None = None
    ) -> LogLinearState:
        memory, recent, position = super().init_state(batch_size)
        return LogLinearState(memory[:, :, None].repeat(1, 1, self.levels, 1, 1), recent, position)

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        sizes = (self.key_dim, self.value_dim, self.levels)
        per_head = log_linear_flops(paradigm, length, *sizes, chunk_size=self.chunk_size, context=context)
        return 2 * length * weights + self.n_heads * per_head
