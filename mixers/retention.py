"""Multi-scale retention (RetNet, arXiv 2307.08621 v4, Eq. 5 to 8).

    q, k, v = x W_Q, x W_K, x W_V by head;  q and k turn by the angle n theta at position n
    S_n = gamma S_{n-1} + k_n^T v_n         o_n = q_n S_n / sqrt(K) / sqrt(sum_{i<=n} gamma^{n-i})
    y   = (swish(x W_G) * HeadNorm(o)) W_O

Differs from the paper: of its three score normalisers, the first two are exact in every paradigm (the second in closed
form from the token's position); the third, max(|sum of scores|, 1), cannot be formed in the recurrent paradigm and
cancels under the head norm, so it is left out.
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
from ..ops.materialize import once
from ..ops.paradigm import Paradigm
from .contract import ContractError, MixerConfig, SequenceMixer, Traits
from .heads import HeadNorm, head_norm, head_width
from .positions import Schedule, advance, frequencies, rotate, rotation, token_positions


class RetentionConfig(MixerConfig):
    """Retention: a matrix state a head, with a fixed decay a head."""

    kind: Literal["retention"] = "retention"
    n_heads: int = Field(gt=0, examples=[2, 1, 3])
    """Heads, each with its own decay."""
    expand_k: float = Field(default=1.0, gt=0, le=1000, examples=[0.5])
    """Width of all queries (and keys) over d_model."""
    expand_v: float = Field(default=2.0, gt=0, le=1000, examples=[1.0])
    """Width of all values over d_model."""
    decay: Literal["geometric", "log_uniform", "constant", "none"] = "geometric"
    """`geometric`: gamma_h = 1 - 2^(-5-h) (Eq. 8); `log_uniform`: 1 - gamma from 1/32 to 1/512 evenly in its logarithm,
    whatever the number of heads (the paper's own runs, §3.1); `constant`: `gamma` for all; `none`: no decay."""
    gamma: float | None = Field(default=None, gt=0, lt=1, examples=[0.8])
    """The decay of `decay: constant`, and of nothing else."""
    learnable_decay: bool = False
    """Whether the decays are parameters, started at their schedule."""
    rotation: Schedule | Literal["none"] = "retnet"
    """Angles of the rotation: `retnet` as the authors' code, `rope` as RoFormer's, or `none`."""
    rotation_base: float = Field(default=10000.0, gt=1)
    """The base of the angles."""
    gate: Literal["swish", "none"] = "swish"
    """The output gate."""
    head_norm: HeadNorm = "group"
    """The norm of each head's output, without weights."""
    norm_eps: float = Field(default=1e-6, ge=0)
    """Added to the head norm's variance. 0 makes every positive factor of a head's output cancel exactly."""
    row_norm: bool = True
    """The paper's second score normaliser, 1/sqrt of the sum of the decays."""
    chunk_size: int = Field(default=128, gt=0, le=2**20)
    """Tokens a chunk; changes the cost, never the result."""
    backend: Backend = "auto"
    """Whose kernels compute the chunkwise paradigm, and steps of decoding; changes the cost, never the result."""
    paradigm: Paradigm = Field(default=Paradigm.CHUNKWISE, strict=False)
    """The paradigm of training and evaluation."""

    @model_validator(mode="after")
    def _decay_options_agree(self) -> "RetentionConfig":
        if self.decay == "constant" and self.gamma is None:
            raise ValueError("decay: constant needs gamma, the decay of all heads, above 0 and below 1")
        if self.decay != "constant" and self.gamma is not None:
            raise ValueError(f"gamma goes with decay: constant alone; decay is {self.decay}")
        if self.decay == "none" and self.learnable_decay:
            raise ValueError("learnable_decay needs a decay to start from; decay is none")
        return self

    @property
    def traits(self) -> Traits:
        """All paradigms; the row normaliser counts tokens from the sequence's start, so it sees absolute position."""
        return Traits(paradigms=frozenset(Paradigm), state="constant", packing=True, shift_invariant=not self.row_norm)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Retention":  # noqa: ARG002
        """Build the layer.

        Raises:
            ContractError: the heads do not divide the widths.
        """
        return Retention(self, d_model)


class RetentionState(NamedTuple):
    """What retention keeps of the tokens it has read."""

    memory: Float[Tensor, "B H K V"]
    """S, float32 or float64."""
    position: Int[Tensor, " B"]
    """Tokens read."""


class Retention(SequenceMixer[RetentionState]):
    """The layer of `RetentionConfig`."""

    splits = True

    def __init__(self, config: RetentionConfig, d_model: int) -> None:
        super().__init__(config)
        self.config = config
        self.key_dim = head_width(d_model, config.expand_k, config.n_heads, "expand_k")
        self.value_dim = head_width(d_model, config.expand_v, config.n_heads, "expand_v")
        if config.rotation != "none" and self.key_dim % 2:
            raise ContractError(f"rotation turns pairs, and a head's keys are {self.key_dim} wide: make that even")
        keys, values = config.n_heads * self.key_dim, config.n_heads * self.value_dim
        self.widths = [keys, keys, values, values] if config.gate == "swish" else [keys, keys, values]
        # one product for queries, keys, values and gate
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.decay_logit = nn.Parameter(torch.empty(config.n_heads)) if config.learnable_decay else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform with gain 2^-2.5 (2^-1 for the output), as the authors' code."""
        for projection in self.in_proj.weight.split(self.widths):
            nn.init.xavier_uniform_(projection, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)
        if self.decay_logit is not None:
            leak = self._leak(self.decay_logit.device)
            with torch.no_grad():
                self.decay_logit.copy_(torch.log1p(-leak) - leak.log())

    def mix(  # noqa: D102
        self,
        x: Float[Tensor, "B T D"],
        state: RetentionState | None,
        paradigm: Paradigm,
        cu_seqlens: Int[Tensor, "N+1"] | None,
        return_state: bool,
    ) -> tuple[Float[Tensor, "B T D"], RetentionState | None]:
        batch, length, _ = x.shape
        offset, (start, total) = None if state is None else state.position, self.extent(length)
        positions = token_positions(length, offset, cu_seqlens, x.device, start)
        log_decay = self.log_decay()
        qk, v, *gate = self.in_proj(x).split([sum(self.widths[:2]), *self.widths[2:]], dim=-1)
        qk = rearrange(qk, "b t (h k) -> b t h k", k=self.key_dim)
        if self.config.rotation != "none":
            theta = frequencies(self.key_dim, self.config.rotation, self.config.rotation_base, x.device)
            qk = rotate(qk, rotation(positions, theta, qk.dtype))
        q, k = qk.chunk(2, dim=2)
        scale = self.key_dim**-0.5
        if self.config.row_norm:
            # both score normalisers in one product
            q, scale = q * once((scale * row_scale(positions, log_decay)).to(q.dtype), 2), 1.0
        output, memory = decay(
            paradigm,
            q,
            k,
            rearrange(v, "b t (h v) -> b t h v", v=self.value_dim),
            None if log_decay is None else log_decay.to(self.state_dtype),
            scale=scale,
            initial_state=None if state is None else state.memory,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            chunk_size=self.config.chunk_size,
            backend=self.backend_of(paradigm),
            context=self.context,
        )
        output = rearrange(head_norm(output, self.config.head_norm, self.config.norm_eps), "b t h v -> b t (h v)")
        y = self.out_proj(F.silu(gate[0]) * output if gate else output)
        if memory is None:
            return y, None
        return y, RetentionState(memory, advance(offset, batch, total, cu_seqlens, x.device))

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> RetentionState:  # noqa: ARG002, D102
        memory = (batch_size, self.config.n_heads, self.key_dim, self.value_dim)
        return RetentionState(
            torch.zeros(memory, device=self.device, dtype=self.state_dtype),
            torch.zeros(batch_size, device=self.device, dtype=torch.int64),
        )

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:  # noqa: D102
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * length * weights + self.config.n_heads * decay_flops(
            paradigm, length, self.key_dim, self.value_dim, chunk_size=self.config.chunk_size, context=context
        )

    def kernels(self, dtype: torch.dtype) -> tuple[str, Probe]:  # noqa: D102
        log_decay = None if self.config.decay == "none" else "H"
        return "decay", Probe(
            device=self.device, dtype=dtype, key_width=self.key_dim, value_width=self.value_dim, log_decay=log_decay
        )

    def log_decay(self) -> Float[Tensor, " H"] | None:
        """Natural log of each head's decay, float64; None where nothing decays."""
        if self.config.decay == "none":
            return None
        if self.decay_logit is not None:
            return F.logsigmoid(self.decay_logit.to(torch.float64))
        # log1p: 1 - 2^-25 is 1 in float32
        return torch.log1p(-self._leak(self.device))

    def _leak(self, device: torch.device) -> Float[Tensor, " H"]:
        """1 - gamma of each head by its schedule, float64."""
        heads = self.config.n_heads
        if self.config.decay == "constant" and self.config.gamma is not None:
            return torch.full((heads,), 1 - self.config.gamma, device=device, dtype=torch.float64)
        if self.config.decay == "log_uniform":
            return torch.exp2(torch.linspace(-5, -9, heads, device=device, dtype=torch.float64))
        return torch.exp2(-5 - torch.arange(heads, device=device, dtype=torch.float64))


def row_scale(positions: Int[Tensor, "B T"], log_decay: Float[Tensor, " H"] | None) -> Float[Tensor, "B T H 1"]:
    """1/sqrt(sum_{i<=n} gamma^{n-i}) = sqrt((1 - gamma) / (1 - gamma^{n+1})), n the position from 0; float64."""
    count = positions[..., None, None].to(torch.float64) + 1
    if log_decay is None:
        return count.rsqrt()
    a = log_decay[:, None]
    return (torch.expm1(a) / torch.expm1(count * a)).sqrt()
