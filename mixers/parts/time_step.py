"""Decays from step sizes, a_t = exp(-e^{A_log} dt_t) with dt_t = softplus(x_t + b) (Mamba-2, arXiv 2405.21060)."""

import math
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from ..base.roles import Role, Roles
from .matrix_state import MatrixStateConfig


def in_range(least: float, most: float) -> AfterValidator:
    """Return a validator that accepts a pair (low, high) with least <= low <= high <= most."""

    def check(pair: tuple[float, float]) -> tuple[float, float]:
        if not least <= pair[0] <= pair[1] <= most:
            raise ValueError(f"expected a range with {least:g} <= lowest <= highest <= {most:g}, got {pair}")
        return pair

    return AfterValidator(check)


def _check_limit(pair: tuple[float, float | None]) -> tuple[float, float | None]:
    low = pair[0]
    high = math.inf if pair[1] is None else pair[1]
    if not (0 <= low <= 1e3 and low < high and (high <= 1e3 or high == math.inf)):
        raise ValueError(
            f"expected step size limits with 0 <= lowest < highest <= 1000, or .inf for no upper limit, got {pair}"
        )
    return low, None if high == math.inf else high  # JSON cannot represent infinity


Limit = Annotated[tuple[float, Annotated[float, Field(allow_inf_nan=True)] | None], AfterValidator(_check_limit)]
"""Type of a field with a lower and an upper limit of step sizes, from 0 to 1e3; .inf or null for no upper limit."""


class TimeStepRange(MatrixStateConfig):
    """Fields of a mixer with step sizes, which depend on the token."""

    time_step_range: Annotated[tuple[float, float], in_range(1e-6, 1e3)] = Field(default=(1e-3, 0.1), strict=False)
    """Range of the initial step sizes, from 1e-6 to 1e3: evenly spaced in the logarithm, for an input of zero. The
    authors' code raises step sizes below 1e-4 to 1e-4."""


class TimeStepFields(TimeStepRange):
    """Fields of a mixer with step sizes and decay rates."""

    time_step_limit: Limit | None = Field(default=None, strict=False, examples=[(2e-3, 0.1)])
    """Lower and upper limit of step sizes, from 0 to 1e3. An upper limit of .inf or null means none; null in place of
    the pair means no limits."""
    a_range: Annotated[tuple[float, float], in_range(1e-6, 1e6)] = Field(default=(1.0, 16.0), strict=False)
    """Range of the initial decay rates e^{A_log}, evenly spaced; from 1e-6 to 1e6."""


def step_bias(uniform: Float[Tensor, "*batch"], steps: tuple[float, float]) -> Float[Tensor, "*batch"]:
    """Return biases whose softplus is a step size from a range, evenly spaced in the logarithm.

    Args:
        uniform: numbers from 0 (lowest step size) to 1 (highest).
        steps: lowest and highest step size.
    """
    low, high = map(math.log, steps)
    step = (low + (high - low) * uniform).exp()
    return step + torch.log(-torch.expm1(-step))


class TimeStepDecay(nn.Module):
    """Step sizes and log-decays of heads, each with a rate e^{A_log} and a bias b.

    Args:
        n_heads: number of heads.
        rates: range of the initial rates e^{A_log}, evenly spaced.
        steps: range of the initial softplus(b), evenly spaced in the logarithm.
        limit: lower and upper limit of step sizes (None: no upper limit); None for no limits.
        key_dim: number of key dimensions per head, each with its own step size and bias; None for one per head.
        lower_bound: if set, log-decays are lower_bound * sigmoid(e^{A_log} (x + b)) instead of -e^{A_log} dt.
    """

    parameter_roles: ClassVar[Roles] = {"A_log": Role.RATE, "dt_bias": Role.RATE}

    def __init__(
        self,
        n_heads: int,
        rates: tuple[float, float] = (0.0, 16.0),
        steps: tuple[float, float] = (1e-3, 0.1),
        limit: tuple[float, float | None] | None = None,
        key_dim: int | None = None,
        lower_bound: float | None = None,
    ) -> None:
        super().__init__()
        self.rates = rates
        self.steps = steps
        self.limit = limit
        self.lower_bound = lower_bound
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.dt_bias = nn.Parameter(torch.empty(n_heads) if key_dim is None else torch.empty(n_heads, key_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise rates and biases at random in their ranges."""
        uniform = [torch.rand(x.shape, device=x.device) for x in (self.A_log, self.dt_bias)]
        low, high = self.rates
        # uniform < 1, so a lowest rate of 0 is never reached
        self.A_log.copy_((high - (high - low) * uniform[0]).log())
        self.dt_bias.copy_(step_bias(uniform[1], self.steps))

    @torch.no_grad()
    def set_reach(self, tokens: Float[Tensor, " H"]) -> list[str]:
        """Set the biases so that heads have this reach at an input of zero, see `SequenceMixer.set_reach`.

        The rates do not change.
        """
        log_decay = -torch.log1p(1 / tokens)
        rate = self.A_log.exp()
        if self.lower_bound is None:
            step = (-log_decay / rate).clamp(*(self.limit or (0.0, None)))
            bias = step + torch.log(-torch.expm1(-step))
        else:
            bias = torch.logit(log_decay / self.lower_bound, eps=1e-6) / rate
        self.dt_bias.copy_(bias if self.dt_bias.ndim == 1 else bias[:, None])
        return ["dt_bias"]

    def forward(self, dt: Float[Tensor, "B T *H"]) -> tuple[Float[Tensor, "B T *H"], Float[Tensor, "B T *H"]]:
        """Return step sizes and log-decays, [B T H], or [B T H K] if each key dimension has its own.

        Both are float32 or float64: in 16 bits, a decay of 0.999 would round to 1.
        """
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        logits = dt.to(wide) + self.dt_bias.to(wide)
        step = F.softplus(logits)
        if self.limit is not None:
            step = step.clamp(*self.limit)
        rate = self.A_log.to(wide).exp()
        rate = rate if self.dt_bias.ndim == 1 else rate[:, None]
        return step, -step * rate if self.lower_bound is None else self.lower_bound * (rate * logits).sigmoid()
