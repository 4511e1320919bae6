"""Fixed decays per head, which do not depend on the tokens (RetNet, arXiv 2307.08621, Eq. 8)."""

from typing import ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...ops.runtime.memo import Memo, once
from ..base.roles import Role, Roles

DecaySchedule = Literal["geometric", "log_uniform", "constant", "none"]
LogDecays: TypeAlias = tuple[Float[Tensor, " H"], Float[Tensor, " H"]]


class FixedDecay(nn.Module):
    """Fixed decay gamma of each head, given by a schedule, or learned from it.

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
