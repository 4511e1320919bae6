"""Decays from step sizes (Mamba-2, arXiv 2405.21060): a_t = exp(-e^{A_log} dt_t) with dt_t = softplus(x_t + b)."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from .matrix_state import MatrixStateConfig


def in_range(least: float, most: float) -> AfterValidator:
    """The check of a field of two numbers in order: beyond these bounds float32 or float16 has no numbers left."""

    def check(given: tuple[float, float]) -> tuple[float, float]:
        if not least <= given[0] <= given[1] <= most:
            raise ValueError(f"a range needs {least:g} <= lowest <= highest <= {most:g}, and is {given}")
        return given

    return AfterValidator(check)


def _limit(given: tuple[float, float | None]) -> tuple[float, float | None]:
    low = given[0]
    high = math.inf if given[1] is None else given[1]
    if not (0 <= low <= 1e3 and low < high and (high <= 1e3 or high == math.inf)):
        raise ValueError(
            f"limits of the step size need 0 <= lowest < highest <= 1000, or .inf for no highest, and are {given}"
        )
    return low, None if high == math.inf else high  # JSON has no infinity


Limit = Annotated[tuple[float, Annotated[float, Field(allow_inf_nan=True)] | None], AfterValidator(_limit)]
"""The type of a field that bounds step sizes, at most 1e3; .inf or null as the upper for none."""


class TimeStepRange(MatrixStateConfig):
    """The field of a mixer with step sizes."""

    time_step_range: Annotated[tuple[float, float], in_range(1e-6, 1e3)] = Field(default=(1e-3, 0.1), strict=False)
    """Step sizes at the start lie between these two, evenly in their logarithm (where the input adds nothing). From
    1e-6 to 1e3; the authors' code raises those below 1e-4 to that."""


class TimeStepFields(TimeStepRange):
    """Fields of a mixer with step sizes and decay rates."""

    time_step_limit: Limit | None = Field(default=None, strict=False, examples=[(2e-3, 0.1)])
    """Step sizes are clamped to these two, of at most 1e3; .inf or null as the upper for none, null for neither."""
    a_range: Annotated[tuple[float, float], in_range(1e-6, 1e6)] = Field(default=(1.0, 16.0), strict=False)
    """Decay rates e^{A_log} at the start lie evenly between these two; from 1e-6 to 1e6."""


def step_bias(uniform: Float[Tensor, "*batch"], steps: tuple[float, float]) -> Float[Tensor, "*batch"]:
    """What softplus makes steps of, which lie between two numbers where `uniform` lies between 0 and 1, evenly in their
    logarithm."""
    low, high = map(math.log, steps)
    step = (low + (high - low) * uniform).exp()
    return step + torch.log(-torch.expm1(-step))


class TimeStepDecay(nn.Module):
    """The step sizes and log-decays of heads, each with a rate e^{A_log} and a bias b.

    Args:
        n_heads: heads.
        rates: e^{A_log} at the start lies evenly between these two.
        steps: softplus(b) at the start lies between these two, evenly in its logarithm.
        limit: step sizes are clamped to these two (None: no highest); None for no limits.
        key_dim: key dimensions of a head, each with a step size and a bias; None for one of a head.
        lower_bound: log-decays are it times sigmoid(e^{A_log} (x + b)), instead of -e^{A_log} dt; None for no bound.
    """

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
        """Rates and biases in their ranges."""
        uniform = [torch.rand(x.shape, device=x.device) for x in (self.A_log, self.dt_bias)]
        low, high = self.rates
        self.A_log.copy_((high - (high - low) * uniform[0]).log())  # from above a lowest rate of 0
        self.dt_bias.copy_(step_bias(uniform[1], self.steps))

    @torch.no_grad()
    def set_reach(self, tokens: Float[Tensor, " H"]) -> list[str]:
        """As `SequenceMixer.set_reach`, where the input adds nothing; the biases do it, and rates stay."""
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
        """Step sizes and log-decays, of [B T H], or [B T H K] where key dimensions have their own.

        float32 or float64: 16 bits cannot tell 0.999 from 1.
        """
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        logits = dt.to(wide) + self.dt_bias.to(wide)
        step = F.softplus(logits)
        if self.limit is not None:
            step = step.clamp(*self.limit)
        rate = self.A_log.to(wide).exp()
        rate = rate if self.dt_bias.ndim == 1 else rate[:, None]
        return step, -step * rate if self.lower_bound is None else self.lower_bound * (rate * logits).sigmoid()
