"""Lightning attention (TransNormerLLM, arXiv 2307.14995; Lightning Attention-2, 2401.04658; MiniMax-01, 2501.08313).

    q, k, v = silu(x W_Q), silu(x W_K), silu(x W_V) by head
    S_t = lambda S_{t-1} + k_t^T v_t                lambda is fixed for head h of H in layer l of L, all from 0
    o_t = q_t S_t
    y   = (sigmoid(x W_G) * RMSNorm(o)) W_O         the norm is over all heads together, with weights

    minimax:      lambda = exp(-2^(-8 (h+1) / H) (1 - l / (L - 1) + 1e-5))      head 0 decays fastest
    transnormer:  lambda = exp(-(8 h / H) (1 - l / L))                          head 0 never decays

What surrounds the recurrence is MiniMax-01's with either schedule: no positions, and no 1/sqrt(K), which would cancel
under the norm but for its eps. TransNormerLLM has silu on queries and keys alone, a norm without weights, a gate
without a function, and rotated positions in its first layer. In a model of one layer l / (L - 1) is taken for 0.
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
from .heads import head_width


class LightningConfig(MixerConfig):
    """Lightning attention: a matrix state a head, with a decay fixed by head and layer."""

    kind: Literal["lightning"] = "lightning"
    n_heads: int = Field(gt=0, examples=[2, 1, 3])
    """Heads, each with its own decay."""
    expand_k: float = Field(default=1.0, gt=0, le=1000, examples=[0.5])
    """Width of all queries (and keys) over d_model."""
    expand_v: float = Field(default=1.0, gt=0, le=1000, examples=[2.0])
    """Width of all values over d_model."""
    schedule: Literal["minimax", "transnormer"] = "minimax"
    """The decays: MiniMax-01's or TransNormerLLM's; deeper layers remember longer in both."""
    norm_eps: float = Field(default=1e-6, ge=0)
    """Added to the mean square of the output."""
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

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Lightning":
        """Build the layer.

        Raises:
            ContractError: the heads do not divide the widths.
        """
        return Lightning(self, d_model, layer_idx, n_layers)


class LightningState(NamedTuple):
    """What lightning attention keeps of the tokens it has read."""

    memory: Float[Tensor, "B H K V"]
    """S, float32 or float64."""


class Lightning(SequenceMixer[LightningState]):
    """The layer of `LightningConfig`."""

    splits = True

    def __init__(self, config: LightningConfig, d_model: int, layer_idx: int, n_layers: int) -> None:
        super().__init__(config)
        self.config, self.layer_idx, self.n_layers = config, layer_idx, n_layers
        self.key_dim = head_width(d_model, config.expand_k, config.n_heads, "expand_k")
        self.value_dim = head_width(d_model, config.expand_v, config.n_heads, "expand_v")
        keys, values = config.n_heads * self.key_dim, config.n_heads * self.value_dim
        self.widths = [keys, keys, values, values]
        # one product for queries, keys, values and gate
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.norm_weight = nn.Parameter(torch.empty(values))
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform, as attention: gain 2^-0.5 for queries, keys, values and gate, 1 for the output."""
        for projection in self.in_proj.weight.split(self.widths):
            nn.init.xavier_uniform_(projection, gain=2**-0.5)
        nn.init.ones_(self.norm_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)

    def mix(  # noqa: D102
        self,
        x: Float[Tensor, "B T D"],
        state: LightningState | None,
        paradigm: Paradigm,
        cu_seqlens: Int[Tensor, "N+1"] | None,
        return_state: bool,
    ) -> tuple[Float[Tensor, "B T D"], LightningState | None]:
        qkv, gate = self.in_proj(x).split([sum(self.widths[:3]), self.widths[3]], dim=-1)
        qkv = F.silu(qkv)
        if qkv.dtype == torch.float16:
            # where little decays the output grows with T and leaves the range of float16, until it is normed
            qkv = qkv.float()
        q, k, v = (
            rearrange(part, "b t (h k) -> b t h k", h=self.config.n_heads)
            for part in qkv.split(self.widths[:3], dim=-1)
        )
        output, memory = decay(
            paradigm,
            q,
            k,
            v,
            self.log_decay().to(self.state_dtype),
            scale=1.0,
            initial_state=None if state is None else state.memory,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            chunk_size=self.config.chunk_size,
            backend=self.backend_of(paradigm),
            context=self.context,
        )
        y = self.out_proj(self._gated(rearrange(output, "b t h v -> b t (h v)"), gate))
        return y, None if memory is None else LightningState(memory)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> LightningState:  # noqa: ARG002, D102
        memory = (batch_size, self.config.n_heads, self.key_dim, self.value_dim)
        return LightningState(torch.zeros(memory, device=self.device, dtype=self.state_dtype))

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:  # noqa: D102
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * length * weights + self.config.n_heads * decay_flops(
            paradigm, length, self.key_dim, self.value_dim, chunk_size=self.config.chunk_size, context=context
        )

    def kernels(self, dtype: torch.dtype) -> tuple[str, Probe]:  # noqa: D102
        if dtype == torch.float16:
            dtype = torch.float32  # as `mix` does
        return "decay", Probe(
            device=self.device,
            dtype=dtype,
            key_width=self.key_dim,
            value_width=self.value_dim,
            log_decay="H",
        )

    def log_decay(self) -> Float[Tensor, " H"]:
        """Natural log of each head's decay, float64."""
        heads = torch.arange(self.config.n_heads, device=self.device, dtype=torch.float64)
        if self.config.schedule == "transnormer":
            return -8 * heads / self.config.n_heads * (1 - self.layer_idx / self.n_layers)
        depth = self.layer_idx / max(self.n_layers - 1, 1)
        return -torch.exp2(-8 * (heads + 1) / self.config.n_heads) * (1 - depth + 1e-5)

    def _gated(self, output: Float[Tensor, "B T V"], gate: Float[Tensor, "B T V"]) -> Float[Tensor, "B T V"]:
        """sigmoid(gate) * RMSNorm(output), formed wide, in the gate's dtype."""
        wide = torch.promote_types(output.dtype, torch.float32)
        normed = F.rms_norm(output.to(wide), output.shape[-1:], self.norm_weight.to(wide), self.config.norm_eps)
        return (gate.to(wide).sigmoid() * normed).to(gate.dtype)
