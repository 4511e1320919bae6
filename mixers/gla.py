"""Gated linear attention, GLA (Yang et al., arXiv 2312.06635, §4.1 and 4.4).

    q, k, v = x W_Q, x W_K, x W_V by head
    alpha_t = sigmoid(x_t W_1 W_2 + b)^(1/tau)      one number a key dimension; W_1 W_2 has rank 16
    S_t = diag(alpha_t) S_{t-1} + k_t^T v_t         o_t = q_t S_t / sqrt(K)
    y   = (swish(x W_R) * RMSNorm(o)) W_O           the norm is per head, its weights are the same for all heads

Differs from the paper, as the authors' code does: the norm is an RMS norm and no layer norm, the output gate has no
bias, and there is a factor 1/sqrt(K), which the norm hides but for its eps.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from ..ops.decay.api import Backend, decay, decay_flops
from ..ops.kernels import Probe
from ..ops.paradigm import Paradigm
from .contract import MixerConfig, SequenceMixer, Traits
from .gates import LowRank, gated_norm
from .heads import head_width


class GLAConfig(MixerConfig):
    """GLA: a matrix state a head, with a decay that each token chooses for each key dimension."""

    kind: Literal["gla"] = "gla"
    n_heads: int = Field(gt=0, examples=[2, 1, 3])
    """Heads; the paper has 4."""
    expand_k: float = Field(default=0.5, gt=0, le=1000, examples=[1.0])
    """Width of all queries (and keys) over d_model."""
    expand_v: float = Field(default=1.0, gt=0, le=1000, examples=[2.0])
    """Width of all values over d_model."""
    gate_rank: int = Field(default=16, gt=0, le=2**20, examples=[2])
    """Rank of the map from tokens to decays."""
    gate_logit_normalizer: float = Field(default=16.0, ge=1e-3, le=1e6, examples=[1.0])
    """tau: the larger, the longer the memory."""
    norm_eps: float = Field(default=1e-6, ge=0)
    """Added to the mean square of a head's output."""
    chunk_size: int = Field(default=128, gt=0, le=2**20)
    """Tokens a chunk; changes the cost, never the result."""
    backend: Backend = "auto"
    """Whose kernels compute the chunkwise paradigm, and steps of decoding; changes the cost, never the result."""
    paradigm: Paradigm = Field(default=Paradigm.CHUNKWISE, strict=False)
    """The paradigm of training and evaluation."""

    @property
    def traits(self) -> Traits:
        """All paradigms; positions play no part."""
        return Traits(paradigms=frozenset(Paradigm), state="constant", packing=True, shift_invariant=True)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "GLA":  # noqa: ARG002
        """Build the layer.

        Raises:
            ContractError: the heads do not divide the widths.
        """
        return GLA(self, d_model)


class GLAState(NamedTuple):
    """What GLA keeps of the tokens it has read."""

    memory: Float[Tensor, "B H K V"]
    """S, float32 or float64."""


class GLA(SequenceMixer[GLAState]):
    """The layer of `GLAConfig`."""

    splits = True

    def __init__(self, config: GLAConfig, d_model: int) -> None:
        super().__init__(config)
        self.config = config
        self.key_dim = head_width(d_model, config.expand_k, config.n_heads, "expand_k")
        self.value_dim = head_width(d_model, config.expand_v, config.n_heads, "expand_v")
        keys, values = config.n_heads * self.key_dim, config.n_heads * self.value_dim
        self.widths = [keys, keys, values, values]
        # one product for queries, keys, values and output gate
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.decay_proj = LowRank(d_model, config.gate_rank, keys, bias=True)
        self.norm_weight = nn.Parameter(torch.empty(self.value_dim))
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform with gain 2^-2.5 (2^-1 for the output), as retention; the decays start near 2^(-1/tau)."""
        for projection in self.in_proj.weight.split(self.widths):
            nn.init.xavier_uniform_(projection, gain=2**-2.5)
        self.decay_proj.reset_parameters()
        nn.init.ones_(self.norm_weight)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def mix(  # noqa: D102
        self,
        x: Float[Tensor, "B T D"],
        state: GLAState | None,
        paradigm: Paradigm,
        cu_seqlens: Int[Tensor, "N+1"] | None,
        return_state: bool,
    ) -> tuple[Float[Tensor, "B T D"], GLAState | None]:
        q, k, v, gate = (
            rearrange(part, "b t (h k) -> b t h k", h=self.config.n_heads)
            for part in self.in_proj(x).split(self.widths, dim=-1)
        )
        output, memory = decay(
            paradigm,
            q,
            k,
            v,
            self.log_decay(x),
            initial_state=None if state is None else state.memory,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            chunk_size=self.config.chunk_size,
            backend=self.backend_of(paradigm),
            context=self.context,
        )
        output = gated_norm(output, gate, self.norm_weight, self.config.norm_eps, "norm_first")
        y = self.out_proj(rearrange(output, "b t h v -> b t (h v)"))
        return y, None if memory is None else GLAState(memory)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> GLAState:  # noqa: ARG002, D102
        memory = (batch_size, self.config.n_heads, self.key_dim, self.value_dim)
        return GLAState(torch.zeros(memory, device=self.device, dtype=self.state_dtype))

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:  # noqa: D102
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        inner = decay_flops(
            paradigm,
            length,
            self.key_dim,
            self.value_dim,
            chunk_size=self.config.chunk_size,
            context=context,
            key_decays=True,
        )
        return 2 * length * weights + self.decay_proj.flops(length) + self.config.n_heads * inner

    def kernels(self, dtype: torch.dtype) -> tuple[str, Probe]:  # noqa: D102
        return "decay", Probe(
            device=self.device,
            dtype=dtype,
            key_width=self.key_dim,
            value_width=self.value_dim,
            log_decay="B T H K",
        )

    def log_decay(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H K"]:
        """Natural log of alpha, float32 or float64: 16 bits cannot tell 0.999 from 1."""
        logits = rearrange(self.decay_proj(x), "b t (h k) -> b t h k", h=self.config.n_heads)
        return F.logsigmoid(logits.to(self.state_dtype)) / self.config.gate_logit_normalizer
