"""DeltaNet (Yang et al., arXiv 2406.06484; its delta rule as a layer is Schlag et al.'s, arXiv 2102.11174).

    q, k, v = silu(conv(x W_Q)), silu(conv(x W_K)), silu(conv(x W_V)) by head;  q and k divided by their norms
    b_t = sigmoid(x_t W_b)                  a number a head, from 0 to 1 (to 2 with allow_neg_eigval)
    S_t = S_{t-1} + b_t k_t (v_t - k_t^T S_{t-1})^T         o_t = q_t S_t / sqrt(K)
    y   = RMSNorm(o) W_O                    the norm is per head, its weights are the same for all heads

What the state has at k_t is replaced by v_t, to the part b_t, where linear attention adds. With b up to 2 a direction
may change its sign (Grazzi et al., arXiv 2411.12537). Differs from the paper, as the authors' code does: there is a
factor 1/sqrt(K), which the norm hides but for its eps. An output gate is theirs too, off by default.
"""

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


class DeltaNetConfig(MixerConfig):
    """DeltaNet: a matrix state a head, in which a key's value is replaced."""

    kind: Literal["delta_net"] = "delta_net"
    n_heads: int = Field(gt=0, examples=[2, 1, 3])
    """Heads."""
    expand_k: float = Field(default=1.0, gt=0, le=1000, examples=[0.5])
    """Width of all queries (and keys) over d_model."""
    expand_v: float = Field(default=1.0, gt=0, le=1000, examples=[2.0])
    """Width of all values over d_model."""
    conv_size: int | None = Field(default=4, ge=0, le=64, examples=[2])
    """Tokens that the short convolutions of queries, keys and values see; 0 or null for none."""
    allow_neg_eigval: bool = False
    """Whether b goes up to 2: eigenvalues of the state's transition then lie between -1 and 1."""
    gate: Literal["swish", "none"] = "none"
    """The output gate."""
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

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "DeltaNet":  # noqa: ARG002
        """Build the layer.

        Raises:
            ContractError: the heads do not divide the widths.
        """
        return DeltaNet(self, d_model)


class DeltaNetState(NamedTuple):
    """What DeltaNet keeps of the tokens it has read."""

    memory: Float[Tensor, "B H K V"]
    """S, float32 or float64."""
    convolution: Float[Tensor, "B W-1 C"]
    """The last inputs of the short convolutions, oldest first; empty without them."""


class DeltaNet(SequenceMixer[DeltaNetState]):
    """The layer of `DeltaNetConfig`."""

    splits = True

    def __init__(self, config: DeltaNetConfig, d_model: int) -> None:
        super().__init__(config)
        self.config = config
        self.key_dim = head_width(d_model, config.expand_k, config.n_heads, "expand_k")
        self.value_dim = head_width(d_model, config.expand_v, config.n_heads, "expand_v")
        keys, values = config.n_heads * self.key_dim, config.n_heads * self.value_dim
        # one product for queries, keys, values, gate and betas
        self.widths = [keys, keys, values, values if config.gate == "swish" else 0, config.n_heads]
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        # a filter a channel: those of queries, keys and values are one
        self.convolution = ShortConvolution(sum(self.widths[:3]), config.conv_size) if config.conv_size else None
        self.norm_weight = nn.Parameter(torch.empty(self.value_dim))
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform with gain 2^-2.5 (2^-1 for the output), as retention; filters as `nn.Conv1d`."""
        for projection in self.in_proj.weight.split(self.widths):
            if projection.numel():
                nn.init.xavier_uniform_(projection, gain=2**-2.5)
        if self.convolution is not None:
            self.convolution.reset_parameters()
        nn.init.ones_(self.norm_weight)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def mix(  # noqa: D102
        self,
        x: Float[Tensor, "B T D"],
        state: DeltaNetState | None,
        paradigm: Paradigm,
        cu_seqlens: Int[Tensor, "N+1"] | None,
        return_state: bool,
    ) -> tuple[Float[Tensor, "B T D"], DeltaNetState | None]:
        qkv, gate, beta = self.in_proj(x).split([sum(self.widths[:3]), *self.widths[3:]], dim=-1)
        if self.convolution is None:
            qkv, recent = F.silu(qkv), self._empty(x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        else:
            before = None if state is None else state.convolution
            qkv, recent = self.convolution(qkv, before, cu_seqlens, return_state, self.context)
        q, k, v = (
            rearrange(part, "b t (h k) -> b t h k", h=self.config.n_heads)
            for part in qkv.split(self.widths[:3], dim=-1)
        )
        beta = beta.to(self.state_dtype).sigmoid()
        output, memory = delta(
            paradigm,
            unit_norm(q),
            unit_norm(k),
            v,
            2 * beta if self.config.allow_neg_eigval else beta,
            None,
            initial_state=None if state is None else state.memory,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            chunk_size=self.config.chunk_size,
            context=self.context,
        )
        if self.config.gate == "swish":
            gate = rearrange(gate, "b t (h v) -> b t h v", h=self.config.n_heads)
            output = gated_norm(output, gate, self.norm_weight, self.config.norm_eps, "norm_first")
        else:
            output = F.rms_norm(output, (self.value_dim,), self.norm_weight.to(output.dtype), self.config.norm_eps)
        y = self.out_proj(rearrange(output, "b t h v -> b t (h v)"))
        return y, None if memory is None or recent is None else DeltaNetState(memory, recent)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> DeltaNetState:  # noqa: ARG002, D102
        memory = (batch_size, self.config.n_heads, self.key_dim, self.value_dim)
        recent = self._empty(batch_size) if self.convolution is None else self.convolution.init_state(batch_size)
        return DeltaNetState(torch.zeros(memory, device=self.device, dtype=self.state_dtype), recent)

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:  # noqa: D102
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * length * weights + self.config.n_heads * delta_flops(
            paradigm, length, self.key_dim, self.value_dim, chunk_size=self.config.chunk_size, context=context
        )

    def _empty(self, batch_size: int) -> Float[Tensor, "B 0 C"]:
        """The state of a convolution that is not there."""
        return self.in_proj.weight.new_zeros(batch_size, 0, sum(self.widths[:3]))
