"""PaTH attention (Yang et al., arXiv 2505.16381): positions by products of transformations that tokens choose.

    q, k, v = x W_Q, x W_K, x W_V by head
    w_t     = silu(conv(x_t W_1 W_2)) by key head, divided by its norm      W_1 W_2 has rank 32, conv is over 3 tokens
    beta_t  = 2 sigmoid(x_t W_beta + b)                                     one scalar per key head
    H_t     = I - beta_t w_t w_t^T
    s_nm    = q_n H_n H_{n-1} .. H_{m+1} k_m / sqrt(K)
    o_n     = sum_{m <= n} softmax_m(s_nm) v_m                              y = o W_O

    forget_gate    s_nm += sum_{m < l <= n} log f_l      f = sigmoid(x W_F + b), one scalar per query head (PaTH-FoX)

With beta = 0 it is attention without positions. Every token changes the keys of all tokens before it, so the KV cache
is written anew at each step, with float32 keys, and has no earlier state: going back reads the tokens again, and
processes cannot share a sequence (context parallelism). The library fla (flash-linear-attention) also multiplies the
sums of log gates by 1/sqrt(K), unlike FoX and this layer.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.attention import Cache, ForgettingCache, KeyCache, key_cache
from ..ops.attention.path import path_attention, path_flops
from ..ops.delta import unit_norm
from ..ops.runtime.call import Call
from ..ops.runtime.paradigm import Paradigm
from .base.contract import SequenceMixer
from .base.roles import Role, RowBlock
from .base.traits import Traits
from .parts import CachedMixer, LowRank, ShortConv, ShortConvolution, head_width
from .parts.cached import CachedState, GroupedQueryConfig, with_recent
from .parts.gates import gate_decay
from .parts.projections import projections_of


class PathAttentionConfig(GroupedQueryConfig):
    """PaTH: softmax attention in which the tokens between a key and a query transform the key."""

    kind: Literal["path_attention"] = "path_attention"
    path_rank: int | None = Field(default=32, gt=0, le=2**20, examples=[3, None])
    """Rank of the map from tokens to directions w; null for a map of full rank."""
    short_conv: ShortConv = 3
    forget_gate: bool = False
    """True to add the log forget gates of all tokens after a key to its scores, one gate per query head (FoX)."""
    chunk_size: int = Field(default=64, gt=0, le=2**20)
    """Tokens per chunk of the chunkwise paradigm; changes the cost, and the result only by rounding."""
    paradigm: Paradigm = Field(default=Paradigm.CHUNKWISE, strict=False)
    """Paradigm of training and evaluation."""

    @property
    def traits(self) -> Traits:
        """Traits: all paradigms, and a state that grows."""
        return Traits(paradigms=frozenset(Paradigm), state="growing", packing=True, shift_invariant=True)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "PathAttention":
        return PathAttention(self, d_model)


class PathAttention(CachedMixer):
    """Layer configured by `PathAttentionConfig`."""

    supports_context_parallel = False

    def __init__(self, config: PathAttentionConfig, d_model: int) -> None:
        super().__init__(config)
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.head_dim = head_width(d_model, 1.0, config.n_heads, "1")
        keys = self.n_kv_heads * self.head_dim
        self.widths = {"q": d_model, "k": keys, "v": keys, "beta": self.n_kv_heads}
        self.widths |= {"forget": self.n_heads} if config.forget_gate else {}
        heads = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}
        self.row_blocks = [
            RowBlock(name, rows, Role.MATRIX if name in heads else Role.GATE, heads.get(name, 1))
            for name, rows in self.widths.items()
        ]
        self.parameter_roles = {"in_proj.weight": self.row_blocks, "beta_bias": Role.RATE, "forget_bias": Role.RATE}
        self.in_proj = nn.Linear(d_model, sum(self.widths.values()), bias=False)
        if config.path_rank is None:
            self.path_proj = nn.Linear(d_model, keys, bias=False)
        else:
            self.path_proj = LowRank(d_model, config.path_rank, keys, bias=False)
        self.convolution = ShortConvolution.of(config.short_conv, keys)
        self.forget_heads = self.n_heads if config.forget_gate else None
        self.beta_bias = nn.Parameter(torch.empty(self.n_kv_heads))
        self.forget_bias = nn.Parameter(torch.empty(self.n_heads)) if config.forget_gate else None
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise projections as those of `attention`, the convolution as `nn.Conv1d`, and biases as 0."""
        for projection in self.in_proj.weight.split(list(self.widths.values())):
            nn.init.xavier_uniform_(projection, gain=2**-0.5)
        self.path_proj.reset_parameters()
        if self.convolution is not None:
            self.convolution.reset_parameters()
        for bias in (self.beta_bias, self.forget_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        nn.init.xavier_uniform_(self.out_proj.weight)

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], CachedState | None]:
        wide = self.state_dtype
        q, k, v, beta, *forget = self.in_proj(x).split(list(self.widths.values()), dim=-1)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        w, recent = self._directions(x, call)
        beta = 2 * (beta.to(wide) + self.beta_bias).sigmoid()
        log_forget = None if self.forget_bias is None else gate_decay(forget[0].to(wide) + self.forget_bias, 1)
        entered = call if self.convolution is None else call.enter("cache")
        o, cache = path_attention(q, k, v, w, beta, entered, scale=self.score_scale, log_forget=log_forget)
        return self.out_proj(o.flatten(2)), with_recent(None if cache is None else self.stored(cache), recent)

    def _directions(self, x: Tensor, call: Call) -> tuple[Float[Tensor, "B T G K"], Tensor | None]:
        """Return w, and the state of the convolution after the segment (None unless requested)."""
        w = self.path_proj(x)
        recent = None
        if self.convolution is not None:
            w, recent = self.convolution(w, call.enter("recent"))
        return unit_norm(w.unflatten(-1, (-1, self.head_dim)).to(self.state_dtype)), recent

    def stored(self, cache: Cache) -> Cache:
        """Return the cache with wide keys, and values in the parameters' dtype."""
        keys = key_cache(cache)
        wide: KeyCache = keys._replace(keys=keys.keys.to(self.state_dtype), values=keys.values.to(self.dtype))
        return cache._replace(cache=wide) if isinstance(cache, ForgettingCache) else wide

    def rollback(self, x: Any, before: Any, after: Any, tokens: Any, **options: Any) -> Any:
        # the cache has lost the keys of earlier states
        return SequenceMixer.rollback(self, x, before, after, tokens, **options)

    @property
    def cache_window(self) -> None:
        return None

    @property
    def projections(self) -> dict[str, Float[Tensor, "H _ D"]]:
        return projections_of(self.in_proj, self.out_proj, self.row_blocks, self.n_heads)

    @property
    def score_width(self) -> int:
        return self.head_dim

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        return self.n_kv_heads, self.head_dim, self.head_dim

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        weights = sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))
        heads = self.n_heads, self.n_kv_heads
        widths = self.head_dim, self.head_dim
        path = path_flops(paradigm, length, heads, *widths, chunk_size=self.chunk_size, context=context)
        return 2 * length * weights + path
