"""Gated retention, gRet (YOCO, arXiv 2405.05254, §3.1).

    q, k, v = x W_Q, x W_K, x W_V by head;  q and k turn by the angle n theta at position n
    gamma_n = sigmoid(x_n W_gamma)^(1/tau)      one number a head
    S_n = gamma_n S_{n-1} + k_n^T v_n           o_n = q_n S_n / sqrt(K)
    y   = (swish(x W_G) * RMSNorm(o)) W_O       the norm is per head, without weights

It is retention with decays that the tokens choose. Values are as wide as the model, where retention's are twice that.
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
from .contract import ContractError, MixerConfig, SequenceMixer, Traits
from .gates import gated_norm
from .heads import head_width
from .positions import advance, frequencies, rotate, rotation, token_positions


class GatedRetentionConfig(MixerConfig):
    """Gated retention: a matrix state a head, with a decay that each token chooses for each head."""

    kind: Literal["gated_retention"] = "gated_retention"
    n_heads: int = Field(gt=0, examples=[2, 1, 3])
    """Heads."""
    expand_k: float = Field(default=1.0, gt=0, le=1000, examples=[0.5])
    """Width of all queries (and keys) over d_model."""
    expand_v: float = Field(default=1.0, gt=0, le=1000, examples=[2.0])
    """Width of all values over d_model."""
    gate_logit_normalizer: float = Field(default=16.0, ge=1e-3, le=1e6, examples=[1.0])
    """tau: the larger, the longer the memory; 16 as in the authors' code."""
    rotation: Literal["rope", "retnet", "none"] = "rope"
    """Angles of the rotation: `rope` as RoFormer's, `retnet` as the RetNet authors' code, or `none`."""
    rotation_base: float = Field(default=10000.0, gt=1)
    """The base of the angles."""
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
        """All paradigms; rotations see distances alone."""
        return Traits(paradigms=frozenset(Paradigm), state="constant", packing=True, shift_invariant=True)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "GatedRetention":  # noqa: ARG002
        """Build the layer.

        Raises:
            ContractError: the heads do not divide the widths, or a rotation gets an odd one.
        """
        return GatedRetention(self, d_model)


class GatedRetentionState(NamedTuple):
    """What gated retention keeps of the tokens it has read."""

    memory: Float[Tensor, "B H K V"]
    """S, float32 or float64."""
    position: Int[Tensor, " B"]
    """Tokens read."""


class GatedRetention(SequenceMixer[GatedRetentionState]):
    """The layer of `GatedRetentionConfig`."""

    splits = True

    def __init__(self, config: GatedRetentionConfig, d_model: int) -> None:
        super().__init__(config)
        self.config = config
        self.key_dim = head_width(d_model, config.expand_k, config.n_heads, "expand_k")
        self.value_dim = head_width(d_model, config.expand_v, config.n_heads, "expand_v")
        if config.rotation != "none" and self.key_dim % 2:
            raise ContractError(f"rotation turns pairs, and a head's keys are {self.key_dim} wide: make that even")
        keys, values = config.n_heads * self.key_dim, config.n_heads * self.value_dim
        self.widths = [keys, keys, values, values]
        # one product for queries, keys, values and gate
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.decay_proj = nn.Linear(d_model, config.n_heads, bias=False)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform with gain 2^-2.5 (2^-1 for the output), as retention."""
        for projection in (*self.in_proj.weight.split(self.widths), self.decay_proj.weight):
            nn.init.xavier_uniform_(projection, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def mix(  # noqa: D102
        self,
        x: Float[Tensor, "B T D"],
        state: GatedRetentionState | None,
        paradigm: Paradigm,
        cu_seqlens: Int[Tensor, "N+1"] | None,
        return_state: bool,
    ) -> tuple[Float[Tensor, "B T D"], GatedRetentionState | None]:
        batch, length, _ = x.shape
        offset, (start, total) = None if state is None else state.position, self.extent(length)
        qk, v, gate = self.in_proj(x).split([sum(self.widths[:2]), *self.widths[2:]], dim=-1)
        qk = rearrange(qk, "b t (h k) -> b t h k", k=self.key_dim)
        if self.config.rotation != "none":
            positions = token_positions(length, offset, cu_seqlens, x.device, start)
            theta = frequencies(self.key_dim, self.config.rotation, self.config.rotation_base, x.device)
            qk = rotate(qk, rotation(positions, theta, qk.dtype))
        q, k = qk.chunk(2, dim=2)
        output, memory = decay(
            paradigm,
            q,
            k,
            rearrange(v, "b t (h v) -> b t h v", v=self.value_dim),
            self.log_decay(x),
            initial_state=None if state is None else state.memory,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            chunk_size=self.config.chunk_size,
            backend=self.backend_of(paradigm),
            context=self.context,
        )
        gate = rearrange(gate, "b t (h v) -> b t h v", v=self.value_dim)
        output = gated_norm(output, gate, None, self.config.norm_eps, "norm_first")
        y = self.out_proj(rearrange(output, "b t h v -> b t (h v)"))
        if memory is None:
            return y, None
        return y, GatedRetentionState(memory, advance(offset, batch, total, cu_seqlens, x.device))

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> GatedRetentionState:  # noqa: ARG002, D102
        memory = (batch_size, self.config.n_heads, self.key_dim, self.value_dim)
        return GatedRetentionState(
            torch.zeros(memory, device=self.device, dtype=self.state_dtype),
            torch.zeros(batch_size, device=self.device, dtype=torch.int64),
        )

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:  # noqa: D102
        weights = sum(layer.weight.numel() for layer in (self.in_proj, self.decay_proj, self.out_proj))
        return 2 * length * weights + self.config.n_heads * decay_flops(
            paradigm, length, self.key_dim, self.value_dim, chunk_size=self.config.chunk_size, context=context
        )

    def kernels(self, dtype: torch.dtype) -> tuple[str, Probe]:  # noqa: D102
        return "decay", Probe(
            device=self.device,
            dtype=dtype,
            key_width=self.key_dim,
            value_width=self.value_dim,
            log_decay="B T H",
        )

    def log_decay(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"]:
        """Natural log of gamma, float32 or float64: 16 bits cannot tell 0.999 from 1."""
        return F.logsigmoid(self.decay_proj(x).to(self.state_dtype)) / self.config.gate_logit_normalizer
