"""Multi-head latent attention, MLA (DeepSeek-V2, arXiv 2405.04434, §2.1).

    c_t = RMSNorm(x_t W_DKV)                    one latent per token, R wide
    r_t = x_t W_KR, rotated by position         one rotary key for all heads, P wide
    k_t = [c_t W_UK, r_t],  v_t = c_t W_UV      by head, K + P and V wide
    q_t = [a_t W_UQ, a_t W_QR], its second part rotated;  a = x, or RMSNorm(x W_DQ)
    o_n = sum_m softmax_m(q_n . k_m / sqrt(K + P)) v_m      y = o W_O
    absorbed:  q . k_m = [q_1 W_UK^T, q_2] . [c_m, r_m]     o = (sum_m p_m c_m) W_UV

The state holds [c, r] of each token. The parallel and the chunkwise paradigm compute keys and values from it. The
recurrent paradigm absorbs W_UK and W_UV into queries and outputs, so that all heads read the latents directly. Context
parallelism does the same, so that processes only exchange latents.
"""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.attention import Backend, Cache, cast_cache, final_cache, softmax_attention, softmax_flops
from ..ops.runtime.call import Call
from ..ops.runtime.kernel import Probe
from ..ops.runtime.paradigm import Paradigm
from .base.contract import MixerConfig
from .base.layer_call import Mixed
from .base.roles import RowBlock
from .base.traits import Traits
from .parts import CachedMixer, GatedNorm, divided, rotated
from .parts.cached import CachedState
from .parts.gates import fan_in_gain


class LatentAttentionConfig(MixerConfig):
    """Multi-head latent attention: keys and values are linear in one latent per token, which alone is cached."""

    kind: Literal["latent_attention"] = "latent_attention"
    n_heads: int = Field(gt=0, examples=[2, 1, 3])
    """Number of heads."""
    kv_lora_rank: int | None = Field(default=None, gt=0, examples=[5])
    """Width R of the latent; 4 qk_nope_head_dim when null, as in the paper."""
    q_lora_rank: int | None = Field(default=None, gt=0, examples=[6])
    """Rank of the query projection, with a norm between its two matrices; full rank when null."""
    qk_nope_head_dim: int | None = Field(default=None, gt=0, examples=[3])
    """Width K of the part of a head's keys that is not rotated; d_model / n_heads when null."""
    qk_rope_head_dim: int | None = Field(default=None, gt=0, multiple_of=2, examples=[2])
    """Width P of the rotary key, which all heads share; half of K when null."""
    v_head_dim: int | None = Field(default=None, gt=0, examples=[7])
    """Width V of the values of a head; K when null."""
    positions: Literal["rope", "none"] = "rope"
    """Position encoding: `rope` rotates the shared keys and their queries, `none` rotates nothing (Kimi Linear)."""
    rope_base: float = Field(default=10000.0, gt=1, examples=[100.0])
    """Base of the rotation frequencies."""
    norm_eps: float = Field(default=1e-6, ge=0)
    """Constant added to the mean square in the norms of the latents."""
    window: int | None = Field(default=None, gt=1, examples=[4])
    """Number of keys that a query sees, including its own; null for all. A window bounds the state."""
    chunk_size: int = Field(default=512, gt=0, le=2**20)
    """Queries per block of the chunkwise paradigm; changes the cost, never the result."""
    backend: Backend = "auto"
    """Kernel backend of the parallel paradigm; changes the cost, never the result."""
    paradigm: Paradigm = Field(default=Paradigm.PARALLEL, strict=False)
    """Paradigm of training and evaluation."""

    @property
    def traits(self) -> Traits:
        """Traits: all paradigms; the state grows unless a window bounds it."""
        return Traits(
            paradigms=frozenset(Paradigm),
            state="growing" if self.window is None else "constant",
            packing=True,
            shift_invariant=True,
        )

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "LatentAttention":
        return LatentAttention(self, d_model)


class LatentAttention(CachedMixer):
    """Layer configured by `LatentAttentionConfig`.

    The state is a KV cache of one head, whose `keys` are [c, r] and whose `values` are empty.
    """

    reads_weights_of: ClassVar[tuple[str, ...]] = ("kv_up",)
    """Layers whose weights the recurrent paradigm reads as a tensor; they stay floats when a model is quantised."""

    def __init__(self, config: LatentAttentionConfig, d_model: int) -> None:
        super().__init__(config)
        self.n_heads = config.n_heads
        self.key_dim = config.qk_nope_head_dim or divided(
            d_model, 1.0, "1", self.n_heads, "n_heads", f"{self.n_heads} heads do"
        )
        self.rotary_dim = config.qk_rope_head_dim or max(2, self.key_dim // 4 * 2)
        self.value_dim = config.v_head_dim or self.key_dim
        self.rank = config.kv_lora_rank or 4 * self.key_dim
        queries = self.n_heads * (self.key_dim + self.rotary_dim)
        self.widths = {"q": config.q_lora_rank or queries, "latent": self.rank, "rotary": self.rotary_dim}
        self.in_proj = nn.Linear(d_model, sum(self.widths.values()), bias=False)
        # without q_lora_rank, in_proj computes the queries of the heads themselves
        query_rows = RowBlock("q", self.widths["q"], heads=1 if config.q_lora_rank else self.n_heads)
        kv_rows = self.n_heads * (self.key_dim + self.value_dim)
        self.parameter_roles = {
            "in_proj.weight": [query_rows, RowBlock("latent", self.rank), RowBlock("rotary", self.rotary_dim)],
            "q_up.weight": [RowBlock("q", queries, heads=self.n_heads)],
            "kv_up.weight": [RowBlock("kv", kv_rows, heads=self.n_heads)],
        }
        self.q_norm = _norm(config.q_lora_rank, config) if config.q_lora_rank else None
        self.q_up = nn.Linear(config.q_lora_rank, queries, bias=False) if config.q_lora_rank else None
        self.kv_norm = _norm(self.rank, config)
        self.kv_up = nn.Linear(self.rank, kv_rows, bias=False)
        self.out_proj = nn.Linear(self.n_heads * self.value_dim, d_model, bias=False)
        self.gains: dict[str, float] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise matrices as Xavier-uniform, and norm weights as 1."""
        for projection in self.in_proj.weight.split(list(self.widths.values())):
            nn.init.xavier_uniform_(projection)
        for name, layer in self._maps().items():
            nn.init.xavier_uniform_(layer.weight, gain=self.gains.get(name, 1.0))
        for norm in (self.q_norm, self.kv_norm):
            if norm is not None:
                norm.reset_parameters()

    def scale_like(self, base: Any) -> None:
        super().scale_like(base)
        layers, base_layers = self._maps(), base._maps()
        self.gains = {name: fan_in_gain(layer, base_layers[name]) for name, layer in layers.items()}

    def _maps(self) -> dict[str, nn.Linear]:
        layers = {"q_up": self.q_up, "kv_up": self.kv_up, "out_proj": self.out_proj}
        return {name: layer for name, layer in layers.items() if layer is not None}

    @property
    def score_width(self) -> int:
        return self.key_dim + self.rotary_dim

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        return 1, self.rank + self.rotary_dim, 0

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> Mixed[CachedState]:
        q, latents = self._project(x, call)
        # with context parallelism, processes exchange latents, which are smaller than keys and values
        absorbed = call.paradigm is Paradigm.RECURRENT or call.cp_group is not None
        output, final_state = (self._attend_to_latents if absorbed else self._attend_to_keys)(q, latents, call)
        if final_state is not None:
            final_state = cast_cache(final_state, self.dtype)  # under autocast, a new cache has a narrower dtype
        return self.out_proj(output.flatten(2)), final_state

    def _project(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Tensor, Tensor]:
        """Return rotated queries [B T H K+P], and latents with their rotated key [B T 1 R+P]."""
        a, latent, rotary = self.in_proj(x).split(list(self.widths.values()), dim=-1)
        if self.q_norm is not None and self.q_up is not None:
            a = self.q_up(self.q_norm(a, None).to(a.dtype))
        plain, to_rotate = a.unflatten(-1, (self.n_heads, -1)).split([self.key_dim, self.rotary_dim], dim=-1)
        positions = call.positions(x, None if call.state is None else call.state.length)
        rotary_heads = torch.cat((to_rotate, rotary[:, :, None]), dim=2)
        if self.config.positions == "rope":
            rotary_heads = rotated(rotary_heads, positions, "rope", self.config.rope_base, memo=call.memo)
        latent = self.kv_norm(latent, None).to(rotary_heads.dtype)[:, :, None]
        q = torch.cat((plain, rotary_heads[:, :, : self.n_heads]), dim=-1)
        return q, torch.cat((latent, rotary_heads[:, :, self.n_heads :]), dim=-1)

    def _attend_to_keys(self, q: Tensor, latents: Tensor, call: Call) -> tuple[Tensor, Cache | None]:
        """Attend with keys and values per head, computed from new and cached latents."""
        past = call.state
        window = self.config.window
        if past is not None:
            keys, values = self._keys_and_values(past.keys.to(q.dtype))
            past = past._replace(keys=keys, values=values)
        keys, values = self._keys_and_values(latents)
        inner = call._replace(state=past, return_state=False)
        output, _ = softmax_attention(q, keys, values, inner, scale=self.score_scale, window=window)
        if not call.return_state:
            return output, None
        return output, final_cache(latents, latents[..., :0], window, call.state, call.documents, donated=call.donated)

    def _attend_to_latents(self, q: Tensor, latents: Tensor, call: Call) -> tuple[Tensor, Cache | None]:
        """Attend to the latents directly, with queries of the width of the latents."""
        queries, to_values = self._absorb(q)
        output, final_state = softmax_attention(
            queries,
            latents,
            latents[..., :0],
            call,
            scale=self.score_scale,
            window=self.config.window,
            value_dims=self.rank,
        )
        return torch.einsum("bthr,hvr->bthv", output, to_values), final_state

    def _absorb(self, q: Tensor) -> tuple[Float[Tensor, "B T H R+P"], Float[Tensor, "H V R"]]:
        """Return queries as wide as the latents with their rotated key, and the map from latents to values."""
        to_keys, to_values = self._up_weight().split([self.key_dim, self.value_dim], dim=1)
        plain, rotary_queries = q.split([self.key_dim, self.rotary_dim], dim=-1)
        return torch.cat((torch.einsum("bthk,hkr->bthr", plain, to_keys), rotary_queries), dim=-1), to_values

    def _up_weight(self) -> Float[Tensor, "H K+V R"]:
        """Return the matrix that maps latents to keys and values by head, with the effect of adapters and hooks."""
        up = self.kv_up
        weight = up.weight
        plain = type(up) is nn.Linear or getattr(up, "multiplies_by_weight", False)
        if not plain or up._forward_hooks or up._forward_pre_hooks:
            weight = up(torch.eye(self.rank, device=self.device, dtype=self.dtype)).mT
        return weight.unflatten(0, (self.n_heads, -1))

    def _keys_and_values(self, latents: Float[Tensor, "_ M 1 R+P"]) -> tuple[Tensor, Tensor]:
        """Compute keys [_ M H K+P] and values [_ M H V] from latents."""
        latent, rotary = latents.split([self.rank, self.rotary_dim], dim=-1)
        keys_and_values = self.kv_up(latent[:, :, 0]).unflatten(-1, (self.n_heads, -1))
        plain, values = keys_and_values.split([self.key_dim, self.value_dim], dim=-1)
        return torch.cat((plain, rotary.expand(-1, -1, self.n_heads, -1)), dim=-1), values

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        absorbed = paradigm is Paradigm.RECURRENT
        key = self.key_dim + self.rotary_dim
        value = self.value_dim
        options = {"window": self.config.window, "chunk_size": self.config.chunk_size, "context": context}
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        weights += 0 if self.q_up is None else self.q_up.weight.numel()
        expanded = length + (0 if absorbed else self.cache_slots(context))
        widths = (self.rank + self.rotary_dim, self.rank) if absorbed else (key, value)
        return (
            2 * length * weights
            + 2 * expanded * self.kv_up.weight.numel()
            + self.n_heads * softmax_flops(paradigm, length, *widths, **options)
        )

    def kernels(self, dtype: torch.dtype) -> tuple[str, Probe] | None:
        return "softmax", Probe(
            device=self.device,
            dtype=dtype,
            key_width=self.key_dim + self.rotary_dim,
            value_width=self.value_dim,
            window=self.config.window is not None,
        )


def _norm(width: int, config: LatentAttentionConfig) -> GatedNorm:
    """Return an RMS norm of vectors of this width, with weights."""
    return GatedNorm(width, "rms", "none", affine=True, eps=config.norm_eps)
