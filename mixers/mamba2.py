"""Mamba-2 (state space duality; Dao and Gu, arXiv 2405.21060, Eq. 2 and §7).

    z, (u, B, C), dt = x W_in
    u, B, C = silu(conv((u, B, C))) by channel      dt = softplus(dt + b) a head
    S_t = exp(-dt_t e^{A_log}) S_{t-1} + B_t^T (dt_t u_t)               o_t = C_t S_t + D u_t
    y   = (RMSNorm(o * silu(z)) * w) W_O

The decay is one number for each token and head, so a head is the decay op with q = C, k = B and v = dt u. The heads of
a group share B and C, and the norm takes its mean over a group. As in the authors' code, the convolution has a bias,
and A_log, D and b are a number a head. Differs from it: segments of any length start from a state, and limits of the
step size hold in decoding too.
"""

import math
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from ..ops.decay.api import Backend, decay, decay_flops
from ..ops.kernels import Probe
from ..ops.paradigm import Paradigm
from .contract import ContractError, MixerConfig, SequenceMixer, Traits
from .gates import gated_norm
from .heads import divided, divisors, nearest_of
from .short_convolution import ShortConvolution

BOUNDS = {"time_step_range": (1e-6, 1e3), "a_range": (1e-6, 1e6)}
"""Of what may be given: beyond them float32, or float16 in a step times a value, has no numbers left."""


class Mamba2Config(MixerConfig):
    """Mamba-2: a matrix state a head, whose decay and step size depend on the token."""

    kind: Literal["mamba2"] = "mamba2"
    expand: float = Field(default=2.0, gt=0, le=1000, examples=[1.0])
    """Width of all values (and the gate) over d_model."""
    head_dim: int = Field(default=64, gt=0, le=2**20, examples=[6, 12, 24])
    """Width of a head's values; there are expand * d_model / head_dim heads."""
    d_state: int = Field(default=128, gt=0, le=2**20, examples=[5, 1])
    """Width of a head's keys B and queries C."""
    n_groups: int = Field(default=1, gt=0, le=2**20, examples=[2])
    """Groups of heads; those of one share B and C, and are normed together."""
    conv_size: int = Field(default=4, ge=2, le=64, examples=[2])
    """Tokens that the short convolution sees."""
    time_step_range: tuple[float, float] = Field(default=(1e-3, 0.1), strict=False)
    """Step sizes at the start lie between these two, evenly in their logarithm (where the input adds nothing). From
    1e-6 to 1e3; the authors' code raises those below 1e-4 to that."""
    time_step_limit: tuple[float, Annotated[float, Field(allow_inf_nan=True)] | None] | None = Field(
        default=None, strict=False, examples=[(2e-3, 0.1)]
    )
    """Step sizes are clamped to these two, of at most 1e3; .inf or null as the upper for none, null for neither."""
    a_range: tuple[float, float] = Field(default=(1.0, 16.0), strict=False)
    """Decay rates e^{A_log} at the start lie evenly between these two; from 1e-6 to 1e6."""
    norm_eps: float = Field(default=1e-5, ge=0)
    """Added to the norm's mean square."""
    chunk_size: int = Field(default=128, gt=0, le=2**20)
    """Tokens a chunk; changes the cost, never the result."""
    backend: Backend = "auto"
    """Whose kernels compute the chunkwise paradigm, and steps of decoding; changes the cost, never the result."""
    paradigm: Paradigm = Field(default=Paradigm.CHUNKWISE, strict=False)
    """The paradigm of training and evaluation."""

    @field_validator("time_step_range", "a_range")
    @classmethod
    def _range_is_bounded(cls, given: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        least, most = BOUNDS[info.field_name or ""]
        if not least <= given[0] <= given[1] <= most:
            raise ValueError(f"a range needs {least:g} <= lowest <= highest <= {most:g}, and is {given}")
        return given

    @field_validator("time_step_limit")
    @classmethod
    def _limit_is_a_range(cls, given: tuple[float, float | None] | None) -> tuple[float, float | None] | None:
        if given is None:
            return None
        low, high = given[0], math.inf if given[1] is None else given[1]
        if not (0 <= low <= 1e3 and low < high and (high <= 1e3 or high == math.inf)):
            raise ValueError(
                f"limits of the step size need 0 <= lowest < highest <= 1000, or .inf for no highest, and are {given}"
            )
        return low, None if high == math.inf else high  # JSON has no infinity

    @classmethod
    def example_fields(cls) -> dict[str, Any]:
        """Small heads: with the default ones, the smallest model would be 32 wide."""
        return {"head_dim": 6, "d_state": 5}

    @property
    def traits(self) -> Traits:
        """All paradigms; positions play no part."""
        return Traits(paradigms=frozenset(Paradigm), state="constant", packing=True, shift_invariant=True)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Mamba2":  # noqa: ARG002
        """Build the layer.

        Raises:
            ContractError: the heads do not divide the width of the values, or the groups the heads.
        """
        return Mamba2(self, d_model, n_layers)


class Mamba2State(NamedTuple):
    """What Mamba-2 keeps of the tokens it has read."""

    memory: Float[Tensor, "B H K V"]
    """S, float32 or float64."""
    convolution: Float[Tensor, "B W-1 C"]
    """The last inputs of the short convolution, oldest first."""


class Mamba2(SequenceMixer[Mamba2State]):
    """The layer of `Mamba2Config`; `n_layers` makes the output small at the start, as the authors' models do."""

    splits = True

    def __init__(self, config: Mamba2Config, d_model: int, n_layers: int = 1) -> None:
        super().__init__(config)
        self.config, self.n_layers = config, n_layers
        self.n_heads = _n_heads(config, d_model)
        values, keys = self.n_heads * config.head_dim, config.n_groups * config.d_state
        self.widths = [values, keys, keys]
        # one product for gate, what is convolved (values, B, C) and step sizes
        self.in_widths = [values, sum(self.widths), self.n_heads]
        self.in_proj = nn.Linear(d_model, sum(self.in_widths), bias=False)
        self.convolution = ShortConvolution(sum(self.widths), config.conv_size, bias=True)
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm_weight = nn.Parameter(torch.empty(values))
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the authors' code: torch's own for the projections, that of the output over sqrt(n_layers)."""
        for part in (self.in_proj, self.convolution, self.out_proj):
            part.reset_parameters()
        self.out_proj.weight.div_(math.sqrt(self.n_layers))
        low, high = map(math.log, self.config.time_step_range)
        time_step = torch.empty(self.n_heads, device=self.device).uniform_(low, high).exp()
        self.dt_bias.copy_(time_step + torch.log(-torch.expm1(-time_step)))  # what softplus makes it of
        self.A_log.copy_(torch.empty(self.n_heads, device=self.device).uniform_(*self.config.a_range).log())
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm_weight)

    def mix(  # noqa: D102
        self,
        x: Float[Tensor, "B T D"],
        state: Mamba2State | None,
        paradigm: Paradigm,
        cu_seqlens: Int[Tensor, "N+1"] | None,
        return_state: bool,
    ) -> tuple[Float[Tensor, "B T D"], Mamba2State | None]:
        config = self.config
        gate, mixed, dt = self.in_proj(x).split(self.in_widths, dim=-1)
        before = None if state is None else state.convolution
        mixed, recent = self.convolution(mixed, before, cu_seqlens, return_state, self.context)
        u, k, q = mixed.split(self.widths, dim=-1)
        u = rearrange(u, "b t (h v) -> b t h v", v=config.head_dim)
        time_step = self._time_step(dt)
        output, memory = decay(
            paradigm,
            self._by_head(q),
            self._by_head(k),
            (time_step[..., None] * u).to(u.dtype),
            -time_step * self.A_log.to(time_step.dtype).exp(),
            scale=1.0,
            initial_state=None if state is None else state.memory,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            chunk_size=config.chunk_size,
            backend=self.backend_of(paradigm),
            context=self.context,
        )
        output, gate = (
            rearrange(part, "b t (g v) -> b t g v", g=config.n_groups)
            for part in ((output + self.D.to(u.dtype)[:, None] * u).flatten(2), gate)
        )
        output = gated_norm(output, gate, None, config.norm_eps, "gate_first").flatten(2)
        y = self.out_proj(output * self.norm_weight.to(output.dtype))
        return y, None if memory is None or recent is None else Mamba2State(memory, recent)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> Mamba2State:  # noqa: ARG002, D102
        memory = (batch_size, self.n_heads, self.config.d_state, self.config.head_dim)
        return Mamba2State(
            torch.zeros(memory, device=self.device, dtype=self.state_dtype), self.convolution.init_state(batch_size)
        )

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:  # noqa: D102
        config, weights = self.config, self.in_proj.weight.numel() + self.out_proj.weight.numel()
        inner = decay_flops(
            paradigm, length, config.d_state, config.head_dim, chunk_size=config.chunk_size, context=context
        )
        return 2 * length * weights + self.convolution.flops(length) + self.n_heads * inner

    def kernels(self, dtype: torch.dtype) -> tuple[str, Probe]:  # noqa: D102
        keys, values = self.config.d_state, self.config.head_dim
        return "decay", Probe(device=self.device, dtype=dtype, key_width=keys, value_width=values, log_decay="B T H")

    def _time_step(self, dt: Float[Tensor, "B T H"]) -> Float[Tensor, "B T H"]:
        """The step sizes, float32 or float64: in 16 bits a small one and the decay of a long stretch would be lost."""
        time_step = F.softplus(dt.to(self.state_dtype) + self.dt_bias.to(self.state_dtype))
        limit = self.config.time_step_limit
        return time_step if limit is None else time_step.clamp(*limit)

    def _by_head(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T H K"]:
        """B or C, the same for the heads of a group: a view where there is one group."""
        x = rearrange(x, "b t (g k) -> b t g 1 k", g=self.config.n_groups)
        return x.expand(-1, -1, -1, self.n_heads // self.config.n_groups, -1).flatten(2, 3)


def _n_heads(config: Mamba2Config, d_model: int) -> int:
    """The number of heads.

    Raises:
        ContractError: it is none, or the groups do not divide it.
    """
    subject = f"heads of head_dim = {config.head_dim} do"
    n_heads = divided(d_model, config.expand, "expand", config.head_dim, "head_dim", subject)
    if n_heads % config.n_groups:
        raise ContractError(
            f"n_groups = {config.n_groups} does not divide the {n_heads} heads of expand * d_model / head_dim: "
            f"n_groups = {nearest_of(divisors(n_heads), config.n_groups)} would"
        )
    return n_heads
