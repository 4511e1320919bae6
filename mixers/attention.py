"""Softmax attention with grouped heads, a sliding window, and relative positions (arXiv 1706.03762, 2305.13245).

    q, k, v = x W_Q, x W_K, x W_V by head          rope, xpos: q and k turn by the angle n theta at position n
    o_n = sum_m softmax_m(q_n . k_m / sqrt(K)) v_m          over the keys  max(0, n - window + 1) <= m <= n
    xpos: each product of a pair j of dimensions shrinks by zeta_j^((n - m) / 512), zeta_j = (j / (K/2) + 0.4) / 1.4

xPos is Eq. 17 of arXiv 2212.10554 with gamma = 0.4 and a base of 512 tokens, as in the authors' code. The state is a
KV cache; its keys are turned but not shrunk. Differs from the RetNet paper's Transformer baseline: no biases.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..ops.call import Call
from ..ops.kernels import Probe
from ..ops.paradigm import Paradigm
from ..ops.softmax import Backend, Cache, GrowingCache, RingCache, empty_cache, moved, softmax, softmax_flops
from .contract import MixerConfig, SequenceMixer, require_room
from .parts import divisors, nearest_of, rotated
from .traits import ContractError, Traits

AttentionState = Cache
"""The KV cache: a ring buffer under a window or with max_length, else a growing cache."""

XPOS_GAMMA = 0.4
XPOS_BASE = 512
"""Tokens after which a product has shrunk by zeta."""


class AttentionConfig(MixerConfig):
    """Softmax attention: every query attends to all keys before it, or to the last `window` of them."""

    kind: Literal["attention"] = "attention"
    n_heads: int = Field(gt=0, examples=[2, 1, 6])
    """Query heads."""
    n_kv_heads: int | None = Field(default=None, gt=0, examples=[1])
    """Key and value heads, each shared by n_heads / n_kv_heads query heads; as many as query heads when null."""
    head_dim: int | None = Field(default=None, gt=0, examples=[8])
    """Width of one head; d_model / n_heads when null."""
    positions: Literal["rope", "xpos", "none"] = "rope"
    """`rope` turns queries and keys (RoFormer); `xpos` also shrinks their products with distance; or `none`."""
    rope_base: float = Field(default=10000.0, gt=1, examples=[100.0])
    """The base of the angles."""
    window: int | None = Field(default=None, gt=0, examples=[4, 1])
    """Keys that a query sees, its own included; all when null. It bounds the state."""
    chunk_size: int = Field(default=512, gt=0, le=2**20)
    """Queries per block of the chunkwise paradigm; changes the cost, never the result."""
    backend: Backend = "auto"
    """The kernel backend of the parallel paradigm; changes the cost, never the result."""
    paradigm: Paradigm = Field(default=Paradigm.PARALLEL, strict=False)
    """The paradigm of training and evaluation."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "AttentionConfig":
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads must divide n_heads = {self.n_heads}, and {self.n_kv_heads} does not: "
                f"choose one of {divisors(self.n_heads)}"
            )
        if self.positions != "none" and self.head_dim is not None and self.head_dim % 2:
            raise ValueError(
                f"{self.positions} turns pairs of dimensions, so head_dim must be even, not {self.head_dim}"
            )
        return self

    @property
    def traits(self) -> Traits:
        """All paradigms; only a window bounds the state."""
        return Traits(
            paradigms=frozenset(Paradigm),
            state="growing" if self.window is None else "constant",
            packing=True,
            shift_invariant=True,
        )

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Attention":
        return Attention(self, d_model)


class Attention(SequenceMixer[AttentionState]):
    """The layer of `AttentionConfig`."""

    supports_context_parallel = True

    def __init__(self, config: AttentionConfig, d_model: int) -> None:
        super().__init__(config)
        self.config = config
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.head_dim = config.head_dim or _head_dim(config, d_model)
        self.widths = [heads * self.head_dim for heads in (self.n_heads, self.n_kv_heads, self.n_kv_heads)]
        # one product for queries, keys and values
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform with gain 2^-0.5 (1 for the output), as the RetNet authors' Transformer."""
        for projection in self.in_proj.weight.split(self.widths):
            nn.init.xavier_uniform_(projection, gain=2**-0.5)
        nn.init.xavier_uniform_(self.out_proj.weight)

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], AttentionState | None]:
        heads = self.in_proj(x).unflatten(-1, (-1, self.head_dim))
        qk, v = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=2)
        if self.config.positions != "none":
            positions = call.positions(x, None if call.state is None else call.state.length)
            qk = rotated(qk, positions, "rope", self.config.rope_base)
        q, k = qk.split([self.n_heads, self.n_kv_heads], dim=2)
        log_decay = xpos_log_decay(self.head_dim, x.device) if self.config.positions == "xpos" else None
        output, final_state = softmax(q, k, v, call, window=self.config.window, log_decay=log_decay)
        if final_state is not None:
            # autocast narrows the keys and values of a new cache
            keys, values = final_state.keys.to(self.dtype), final_state.values.to(self.dtype)
            final_state = final_state._replace(keys=keys, values=values)
        return self.out_proj(output.flatten(2)), final_state

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> AttentionState:
        kind, capacity = self._room(max_length, 0)
        sizes = (self.n_kv_heads, self.head_dim, self.head_dim)
        return empty_cache(kind, batch_size, capacity, sizes, self.in_proj.weight)

    def resize_state(self, state: AttentionState, max_length: int | None) -> AttentionState:
        read = int(state.length.max())
        require_room(read, max_length, self.kind)
        return moved(state, *self._room(max_length, min(read, state.keys.shape[1])))

    def _room(self, max_length: int | None, used: int) -> tuple[type[RingCache] | type[GrowingCache], int]:
        """The kind of a cache and its slots: a ring buffer where something bounds it, else as many as are used."""
        bounds = [bound for bound in (self.config.window, max_length) if bound is not None]
        return RingCache if bounds else GrowingCache, min(bounds, default=used)

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * length * weights + self.n_heads * softmax_flops(
            paradigm,
            length,
            self.head_dim,
            self.head_dim,
            window=self.config.window,
            chunk_size=self.config.chunk_size,
            context=context,
        )

    def kernels(self, dtype: torch.dtype) -> tuple[str, Probe]:
        return "softmax", Probe(
            device=self.device,
            dtype=dtype,
            key_width=self.head_dim,
            value_width=self.head_dim,
            log_decay="K" if self.config.positions == "xpos" else None,
            window=self.config.window is not None,
        )


def xpos_log_decay(head_dim: int, device: torch.device) -> Float[Tensor, " K"]:
    """Natural log of xPos's factor per token of distance, float64, for interleaved pairs."""
    pair = torch.arange(head_dim // 2, device=device, dtype=torch.float64)
    zeta = (pair / (head_dim // 2) + XPOS_GAMMA) / (1 + XPOS_GAMMA)
    return (zeta.log() / XPOS_BASE).repeat_interleave(2)


def _head_dim(config: AttentionConfig, d_model: int) -> int:
    """d_model / n_heads, or an error that names the nearest numbers of heads that would do."""
    unit = 1 if config.positions == "none" else 2
    workable = [n for n in divisors(d_model) if d_model // n % unit == 0 and n % (config.n_kv_heads or 1) == 0]
    if config.n_heads in workable:
        return d_model // config.n_heads
    nearest = nearest_of(workable, config.n_heads)
    into = "evenly" if unit == 1 else f"into heads of even width, as {config.positions} turns pairs of dimensions"
    advice = f"n_heads = {nearest} would, or set head_dim" if nearest else "set head_dim"
    raise ContractError(f"{config.n_heads} heads do not divide d_model = {d_model} {into}: {advice}")
