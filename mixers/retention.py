"""Multi-scale retention (RetNet, arXiv 2307.08621 v4, Eq. 5 to 8).

    q, k, v = x W_Q, x W_K, x W_V by head;  q and k are rotated by the angle n theta at position n
    S_n = gamma S_{n-1} + k_n^T v_n         o_n = q_n S_n / sqrt(K) / sqrt(sum_{i<=n} gamma^{n-i})
    y   = (swish(x W_G) * HeadNorm(o)) W_O

The paper has three score normalisers. The first two are exact in every paradigm (the second in closed form from the
position of the token). The third, max(|sum of scores|, 1), cannot be computed in the recurrent paradigm, and the head
norm cancels it, so it is left out. Since 2023, the authors' code has an RMS norm per head (`head_norm: rms`) instead of
the paper's group norm. W_O is initialised with the gain 2^-1 of the authors' code; their released package has gain 1.
"""

from dataclasses import replace
from typing import ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..ops.decay import decay
from ..ops.runtime.materialize import materialize
from ..ops.runtime.memo import Memo, once
from .base.roles import Role, Roles
from .base.traits import Traits
from .parts import QKV, Call, QKVConfig, QKVMixer, RecurrenceOutput
from .parts.qkv import OutputNorm, Rotation, ValueExpansion

DecaySchedule = Literal["geometric", "log_uniform", "constant", "none"]
LogDecays: TypeAlias = tuple[Float[Tensor, " H"], Float[Tensor, " H"]]


class RetentionConfig(QKVConfig):
    """Retention: a matrix state per head, with a fixed decay per head."""

    kind: Literal["retention"] = "retention"
    expand_v: ValueExpansion = 2.0
    decay: DecaySchedule = "geometric"
    """Schedule of the decays: `geometric` is gamma_h = 1 - 2^(-5-h) (Eq. 8); `log_uniform` has 1 - gamma from 1/32 to
    1/512, evenly spaced in the logarithm, for any number of heads (the paper's own runs, §3.1); `constant` is `gamma`
    for all heads; `none` has no decay."""
    gamma: float | None = Field(default=None, gt=0, lt=1, examples=[0.8])
    """Decay of all heads with `decay: constant`; null otherwise."""
    learnable_decay: bool = False
    """True if the decays are parameters, initialised by the schedule."""
    rotation: Rotation = "retnet"
    head_norm: OutputNorm = "group"
    row_norm: bool = True
    """True to apply the paper's second score normaliser, 1/sqrt of the sum of the decays."""

    @model_validator(mode="after")
    def _check_decay(self) -> "RetentionConfig":
        if self.decay == "constant" and self.gamma is None:
            raise ValueError("decay = constant needs gamma between 0 and 1, got null")
        if self.decay != "constant" and self.gamma is not None:
            raise ValueError(f"gamma needs decay = constant, got decay = {self.decay}")
        if self.decay == "none" and self.learnable_decay:
            raise ValueError("learnable_decay needs a decay schedule to start from, got decay = none")
        return self

    @property
    def traits(self) -> Traits:
        """Traits: all paradigms, a constant state; `row_norm` makes the output depend on absolute position."""
        return replace(super().traits, shift_invariant=not self.row_norm)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Retention":
        return Retention(self, d_model)


class Retention(QKVMixer):
    """Layer configured by `RetentionConfig`."""

    def __init__(self, config: RetentionConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.decay = FixedDecay(config.n_heads, config.decay, config.gamma, learnable=config.learnable_decay)
        self.log_decay_shape = None if config.decay == "none" else "H"

    @property
    def counts_positions(self) -> bool:
        return self.config.row_norm or super().counts_positions

    def recur(self, x: Tensor, h: QKV, call: Call) -> RecurrenceOutput:
        q = h.q
        scale = self.key_dim**-0.5
        exact, log_decay = self.decay.log_decays(x.device, self.state_dtype, call.memo)
        if h.positions is not None and self.config.row_norm:
            q = q * materialize(call.once(normalizers, h.positions, exact, scale, q.dtype), 2)
            scale = 1.0
        return decay(q, h.k, h.v, log_decay, call, scale=scale)


def normalizers(
    positions: Int[Tensor, "_ T"], log_decay: Float[Tensor, " H"] | None, scale: float, dtype: torch.dtype
) -> Float[Tensor, "_ T H 1"]:
    """Return the product of the two score normalisers, `scale` and `row_scale`, at each position."""
    return (scale * row_scale(positions, log_decay)).to(dtype)


def row_scale(positions: Int[Tensor, "_ T"], log_decay: Float[Tensor, " H"] | None) -> Float[Tensor, "_ T H 1"]:
    """Return 1/sqrt(sum_{i<=n} gamma^{n-i}) = sqrt((1 - gamma) / (1 - gamma^{n+1})) at positions n from 0; float64."""
    count = positions[..., None, None].to(torch.float64) + 1
    if log_decay is None:
        return count.rsqrt()
    a = log_decay[:, None]
    return (torch.expm1(a) / torch.expm1(count * a)).sqrt()


class FixedDecay(nn.Module):
    """Decay gamma of each head, which does not depend on the tokens: fixed by a schedule, or learned from it (Eq. 8).

    Args:
        n_heads: number of heads.
        schedule: `geometric`: gamma_h = 1 - 2^(-5-h); `log_uniform`: 1 - gamma from 1/32 to 1/512, evenly spaced in its
            logarithm; `constant`: `gamma` for all heads; `none`: no decay.
        gamma: decay of the schedule `constant`.
        learnable: True if the decays are parameters, initialised by the schedule.
    """

    parameter_roles: ClassVar[Roles] = {"logit": Role.RATE}

    def __init__(self, n_heads: int, schedule: DecaySchedule, gamma: float | None, *, learnable: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.gamma = gamma
        self.schedule: DecaySchedule = schedule
        self.logit = nn.Parameter(torch.empty(n_heads)) if learnable else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise learnable decays by the schedule."""
        if self.logit is not None:
            leak = _leak(self.n_heads, self.schedule, self.gamma, self.logit.device)
            self.logit.copy_(torch.log1p(-leak) - leak.log())

    @torch.no_grad()
    def set_reach(self, tokens: Float[Tensor, " H"]) -> list[str]:
        """Set the reach of learnable decays, see `SequenceMixer.set_reach`; fixed decays are left unchanged."""
        if self.logit is None:
            return []
        self.logit.copy_(tokens.log())  # the logit of gamma = tokens / (1 + tokens)
        return ["logit"]

    def forward(self, device: torch.device) -> Float[Tensor, " H"] | None:
        """Return the natural log of each head's decay, float64; None without decay."""
        return self.log_decays(device, torch.float64)[0]

    def log_decays(
        self, device: torch.device, dtype: torch.dtype, memo: Memo | None = None
    ) -> LogDecays | tuple[None, None]:
        """Return the natural log of each head's decay, as float64 and as `dtype`; (None, None) without decay."""
        if self.schedule == "none":
            return None, None
        if self.logit is None:
            return once(memo, scheduled, self.n_heads, self.schedule, self.gamma, device, dtype)
        log_decay = F.logsigmoid(self.logit.to(torch.float64))
        return log_decay, log_decay.to(dtype)


def scheduled(
    n_heads: int, schedule: DecaySchedule, gamma: float | None, device: torch.device, dtype: torch.dtype
) -> LogDecays:
    """Return the natural log of each head's scheduled decay, as float64 and as `dtype`."""
    log_decay = torch.log1p(-_leak(n_heads, schedule, gamma, device))  # log1p, as 1 - 2^-25 rounds to 1 in float32
    return log_decay, log_decay.to(dtype)


def _leak(n_heads: int, schedule: DecaySchedule, gamma: float | None, device: torch.device) -> Tensor:
    """Return 1 - gamma of each head by the schedule, float64."""
    if gamma is not None:
        return torch.full((n_heads,), 1 - gamma, device=device, dtype=torch.float64)
    if schedule == "log_uniform":
        return torch.exp2(torch.linspace(-5, -9, n_heads, device=device, dtype=torch.float64))
    return torch.exp2(-5 - torch.arange(n_heads, device=device, dtype=torch.float64))
