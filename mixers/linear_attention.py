"""Linear attention (Katharopoulos et al., arXiv 2006.16236, Eq. 9 to 12, 16 to 20).

    S_t = S_{t-1} + phi(k_t)^T v_t      z_t = z_{t-1} + phi(k_t)
    o_t = phi(q_t) S_t / (phi(q_t) z_t + eps)       with the denominator
    o_t = phi(q_t) S_t / sqrt(K)                    without

The denominator's running sum z is one more column of the state: the values get a column of ones, so that z is carried,
packed and differentiated exactly as S is.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..ops.decay.api import Backend, decay, decay_flops
from ..ops.kernels import Probe
from ..ops.paradigm import Paradigm
from .contract import MixerConfig, SequenceMixer, Traits
from .heads import HeadNorm, head_norm, head_width


class LinearAttentionConfig(MixerConfig):
    """Linear attention: a matrix state a head that only grows by addition."""

    kind: Literal["linear_attention"] = "linear_attention"
    n_heads: int = Field(gt=0, examples=[2, 1, 3])
    """Heads."""
    expand_k: float = Field(default=1.0, gt=0, le=1000, examples=[0.5])
    """Width of all queries (and keys) over d_model."""
    expand_v: float = Field(default=1.0, gt=0, le=1000, examples=[2.0])
    """Width of all values over d_model."""
    feature_map: Literal["elu", "relu", "softmax", "identity"] = "elu"
    """phi: `elu` is elu(x) + 1 (the paper's), `softmax` is over a head's width; only `identity` can be negative."""
    denominator: bool = True
    """Whether the output is a weighted mean of the values."""
    eps: float = Field(default=1e-6, gt=0)
    """Added to the denominator."""
    head_norm: HeadNorm = "none"
    """The norm of each head's output, without weights; without a denominator the output grows with T unless normed."""
    norm_eps: float = Field(default=1e-6, ge=0)
    """Added to the head norm's variance."""
    chunk_size: int = Field(default=128, gt=0, le=2**20)
    """Tokens a chunk; changes the cost, never the result."""
    backend: Backend = "auto"
    """Whose kernels compute the chunkwise paradigm, and steps of decoding; changes the cost, never the result."""
    paradigm: Paradigm = Field(default=Paradigm.CHUNKWISE, strict=False)
    """The paradigm of training and evaluation."""

    @model_validator(mode="after")
    def _denominator_needs_weights(self) -> "LinearAttentionConfig":
        if self.denominator and self.feature_map == "identity":
            raise ValueError("a denominator needs weights that are never negative; feature_map is identity")
        return self

    @property
    def traits(self) -> Traits:
        """All paradigms; positions play no part."""
        return Traits(paradigms=frozenset(Paradigm), state="constant", packing=True, shift_invariant=True)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "LinearAttention":  # noqa: ARG002
        """Build the layer.

        Raises:
            ContractError: the heads do not divide the widths.
        """
        return LinearAttention(self, d_model)


class LinearAttentionState(NamedTuple):
    """What linear attention keeps of the tokens it has read."""

    memory: Float[Tensor, "B H K V"]
    """S, float32 or float64; with the denominator its last column is z."""


class LinearAttention(SequenceMixer[LinearAttentionState]):
    """The layer of `LinearAttentionConfig`."""

    splits = True

    def __init__(self, config: LinearAttentionConfig, d_model: int) -> None:
        super().__init__(config)
        self.config = config
        self.key_dim = head_width(d_model, config.expand_k, config.n_heads, "expand_k")
        self.value_dim = head_width(d_model, config.expand_v, config.n_heads, "expand_v")
        keys, values = config.n_heads * self.key_dim, config.n_heads * self.value_dim
        self.widths = [keys, keys, values]
        # one product for queries, keys and values
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform, as attention: gain 2^-0.5 for queries, keys and values, 1 for the output."""
        for projection in self.in_proj.weight.split(self.widths):
            nn.init.xavier_uniform_(projection, gain=2**-0.5)
        nn.init.xavier_uniform_(self.out_proj.weight)

    def mix(  # noqa: D102
        self,
        x: Float[Tensor, "B T D"],
        state: LinearAttentionState | None,
        paradigm: Paradigm,
        cu_seqlens: Int[Tensor, "N+1"] | None,
        return_state: bool,
    ) -> tuple[Float[Tensor, "B T D"], LinearAttentionState | None]:
        q, k, v = (
            rearrange(part, "b t (h k) -> b t h k", h=self.config.n_heads)
            for part in self.in_proj(x).split(self.widths, dim=-1)
        )
        q, k = self._features(q), self._features(k)
        narrow = v.dtype
        if self.config.denominator:
            # numerator and denominator grow with T and leave the range of float16: only their quotient may be narrow
            wide = torch.promote_types(narrow, torch.float32)
            q, k, v = q.to(wide), k.to(wide), F.pad(v.to(wide), (0, 1), value=1.0)
        output, memory = decay(
            paradigm,
            q,
            k,
            v,
            None,
            scale=1.0 if self.config.denominator else None,
            initial_state=None if state is None else state.memory,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            chunk_size=self.config.chunk_size,
            backend=self.backend_of(paradigm),
            context=self.context,
        )
        if self.config.denominator:
            output = (output[..., :-1] / (output[..., -1:] + self.config.eps)).to(narrow)
        output = head_norm(output, self.config.head_norm, self.config.norm_eps)
        y = self.out_proj(rearrange(output, "b t h v -> b t (h v)"))
        return y, None if memory is None else LinearAttentionState(memory)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> LinearAttentionState:  # noqa: ARG002, D102
        memory = (batch_size, self.config.n_heads, self.key_dim, self._state_width)
        return LinearAttentionState(torch.zeros(memory, device=self.device, dtype=self.state_dtype))

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:  # noqa: D102
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * length * weights + self.config.n_heads * decay_flops(
            paradigm, length, self.key_dim, self._state_width, chunk_size=self.config.chunk_size, context=context
        )

    def kernels(self, dtype: torch.dtype) -> tuple[str, Probe]:  # noqa: D102
        if self.config.denominator:
            dtype = torch.promote_types(dtype, torch.float32)
        return "decay", Probe(device=self.device, dtype=dtype, key_width=self.key_dim, value_width=self._state_width)

    @property
    def _state_width(self) -> int:
        return self.value_dim + self.config.denominator

    def _features(self, x: Tensor) -> Tensor:
        if self.config.feature_map == "elu":
            return F.elu(x) + 1
        if self.config.feature_map == "relu":
            return x.relu()
        return x.softmax(-1) if self.config.feature_map == "softmax" else x
