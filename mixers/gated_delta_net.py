"""Gated DeltaNet (Yang, Kautz and Hatamizadeh, arXiv 2412.06464).

    q, k, v = silu(conv(x W_Q)), silu(conv(x W_K)), silu(conv(x W_V)) by head;  q and k divided by their norms
    b_t = sigmoid(x_t W_b)                  a number a head, from 0 to 1 (to 2 with allow_neg_eigval)
    a_t = exp(-e^{A_log} softplus(x_t W_a + dt_bias))       a number a head
    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t k_t^T S_{t-1})^T                 o_t = q_t S_t / sqrt(K)
    y   = (silu(x W_G) * RMSNorm(o)) W_O    the norm is per head, its weights are the same for all heads

The state forgets by a_t, as Mamba-2's does, and replaces what it has at k_t, as DeltaNet's does. The authors' models
have keys 3/4 as wide as d_model, and values twice as wide as keys; here keys are as wide as d_model, which fits any
number of heads that divides it. Differs from the paper, as the authors' code does: there is a factor 1/sqrt(K), which
the norm hides but for its eps.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from ..ops.delta.api import delta, delta_flops, unit_norm
from ..ops.paradigm import Paradigm
from .contract import MixerConfig, SequenceMixer, Traits
from .gates import gated_norm
from .heads import head_width
from .short_convolution import ShortConvolution

TIME_STEPS = (1e-3, 0.1)
"""softplus(dt_bias) at the start lies between these two, evenly in its logarithm."""
LARGEST_RATE = 16.0
"""e^{A_log} at the start lies between 0 and this, evenly."""


class GatedDeltaNetConfig(MixerConfig):
    """Gated DeltaNet: a matrix state a head that forgets, and in which a key's value is replaced."""

    kind: Literal["gated_delta_net"] = "gated_delta_net"
    n_heads: int = Field(gt=0, examples=[2, 1, 3])
    """Heads."""
    expand_k: float = Field(default=1.0, gt=0, le=1000, examples=[0.5])
    """Width of all queries (and keys) over d_model; 0.75 in the authors' models."""
    expand_v: float = Field(default=2.0, gt=0, le=1000, examples=[1.0])
    """Width of all values (and the gate) over d_model; 1.5 in the authors' models."""
    conv_size: int | None = Field(default=4, ge=0, le=64, examples=[2])
    """Tokens that the short convolutions of queries, keys and values see; 0 or null for none."""
    allow_neg_eigval: bool = False
    """Whether b goes up to 2: eigenvalues of the state's transition then lie between -1 and 1."""
    norm_eps: float = Field(default=1e-5, ge=0)
    """Added to the mean square of a head's output."""
    chunk_size: int = Field(default=64, gt=0, le=256)
    """Tokens a chunk; changes the cost, and the result by rounding alone: in float32 by 2e-5 of it at 256, and it would
    be 1e-4 at 2048."""
    paradigm: Paradigm = Field(default=Paradigm.CHUNKWISE, strict=False)
    """The paradigm of training and evaluation."""

    @property
    def traits(self) -> Traits:
        """No parallel paradigm (`ops/delta.py` says why); positions play no part."""
        paradigms = frozenset({Paradigm.RECURRENT, Paradigm.CHUNKWISE})
        return Traits(paradigms=paradigms, state="constant", packing=True, shift_invariant=True)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "GatedDeltaNet":  # noqa: ARG002
        """Build the layer.

        Raises:
            ContractError: the heads do not divide the widths.
        """
        return GatedDeltaNet(self, d_model)


class GatedDeltaNetState(NamedTuple):
    """What Gated DeltaNet keeps of the tokens it has read."""

    memory: Float[Tensor, "B H K V"]
    """S, float32 or float64."""
    convolution: Float[Tensor, "B W-1 C"]
    """The last inputs of the short convolutions, oldest first; empty without them."""


class GatedDeltaNet(SequenceMixer[GatedDeltaNetState]):
    """The layer of `GatedDeltaNetConfig`."""

    splits = True

    def __init__(self, config: GatedDeltaNetConfig, d_model: int) -> None:
        super().__init__(config)
        self.config = config
        self.key_dim = head_width(d_model, config.expand_k, config.n_heads, "expand_k")
        self.value_dim = head_width(d_model, config.expand_v, config.n_heads, "expand_v")
        keys, values = config.n_heads * self.key_dim, config.n_heads * self.value_dim
        # one product for queries, keys, values, gate, betas and decays
        self.widths = [keys, keys, values, values, config.n_heads, config.n_heads]
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        # a filter a channel: those of queries, keys and values are one
        self.convolution = ShortConvolution(sum(self.widths[:3]), config.conv_size) if config.conv_size else None
        self.A_log = nn.Parameter(torch.empty(config.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.n_heads))
        self.norm_weight = nn.Parameter(torch.empty(self.value_dim))
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier-uniform with gain 2^-2.5 (2^-1 for the output), as retention; the rest as the authors' code."""
        for projection in self.in_proj.weight.split(self.widths):
            nn.init.xavier_uniform_(projection, gain=2**-2.5)
        if self.convolution is not None:
            self.convolution.reset_parameters()
        uniform = torch.rand(2, self.config.n_heads, device=self.device)
        self.A_log.copy_((LARGEST_RATE * (1 - uniform[0])).log())  # from above 0
        low, high = map(math.log, TIME_STEPS)
        time_step = (low + (high - low) * uniform[1]).exp()
        self.dt_bias.copy_(time_step + torch.log(-torch.expm1(-time_step)))  # what softplus makes it of
        nn.init.ones_(self.norm_weight)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def mix(  # noqa: D102
        self,
        x: Float[Tensor, "B T D"],
        state: GatedDeltaNetState | None,
        paradigm: Paradigm,
        cu_seqlens: Int[Tensor, "N+1"] | None,
        return_state: bool,
    ) -> tuple[Float[Tensor, "B T D"], GatedDeltaNetState | None]:
        qkv, gate, beta, dt = self.in_proj(x).split([sum(self.widths[:3]), *self.widths[3:]], dim=-1)
        if self.convolution is None:
            qkv, recent = F.silu(qkv), self._empty(x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        else:
            before = None if state is None else state.convolution
            qkv, recent = self.convolution(qkv, before, cu_seqlens, return_state, self.context)
        q, k, v, gate = (
            rearrange(part, "b t (h k) -> b t h k", h=self.config.n_heads)
            for part in (*qkv.split(self.widths[:3], dim=-1), gate)
        )
        beta = beta.to(self.state_dtype).sigmoid()
        output, memory = delta(
            paradigm,
            unit_norm(q),
            unit_norm(k),
            v,
            2 * beta if self.config.allow_neg_eigval else beta,
            self.log_decay(dt),
            initial_state=None if state is None else state.memory,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            chunk_size=self.config.chunk_size,
            context=self.context,
        )
        output = gated_norm(output, gate, self.norm_weight, self.config.norm_eps, "norm_first")
        y = self.out_proj(rearrange(output, "b t h v -> b t (h v)"))
        return y, None if memory is None or recent is None else GatedDeltaNetState(memory, recent)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> GatedDeltaNetState:  # noqa: ARG002, D102
        memory = (batch_size, self.config.n_heads, self.key_dim, self.value_dim)
        recent = self._empty(batch_size) if self.convolution is None else self.convolution.init_state(batch_size)
        return GatedDeltaNetState(torch.zeros(memory, device=self.device, dtype=self.state_dtype), recent)

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:  # noqa: D102
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * length * weights + self.config.n_heads * delta_flops(
            paradigm, length, self.key_dim, self.value_dim, chunk_size=self.config.chunk_size, context=context
        )

    def log_decay(self, dt: Float[Tensor, "B T H"]) -> Float[Tensor, "B T H"]:
        """Natural log of a, float32 or float64: 16 bits cannot tell 0.999 from 1."""
        wide = self.state_dtype
        return -self.A_log.to(wide).exp() * F.softplus(dt.to(wide) + self.dt_bias.to(wide))

    def _empty(self, batch_size: int) -> Float[Tensor, "B 0 C"]:
        """The state of a convolution that is not there."""
        return self.in_proj.weight.new_zeros(batch_size, 0, sum(self.widths[:3]))
