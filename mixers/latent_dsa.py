"""DeepSeek sparse attention over latent attention, as in DeepSeek-V3.2 (arXiv 2512.02556, §2).

    c_t, r_t, q_t   the latents, rotary keys and queries of `latent_attention`
    S_t             the topk tokens that the indexer of `dsa` chooses, the same for all heads
    o_t = sum_{s in S_t} softmax_s([q_1 W_UK^T, q_2] . [c_s, r_s] / sqrt(K + P)) c_s W_UV      by head
    loss            of the indexer, as in `dsa`

All heads read the chosen latents themselves: W_UK and W_UV are absorbed into queries and outputs in every paradigm,
since keys and values of all heads would have to be gathered for each query otherwise. If topk covers a text, the layer
is latent attention. The state holds [c, r, k^I] of each token. What `dsa` says of the loss, of gradients and of its
indexer holds here too.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from ..ops.attention import cast_cache
from ..ops.runtime.call import Call
from ..ops.runtime.paradigm import Paradigm
from ..ops.sparse_attention import index_attention, sparse_flops
from .base.layer_call import Mixed, MixResult
from .latent_attention import LatentAttention, LatentAttentionConfig
from .parts.cached import CachedState
from .parts.indexer import IndexedConfig, Indexer


class LatentDsaConfig(IndexedConfig, LatentAttentionConfig):
    """DeepSeek sparse attention: latent attention to the tokens that an indexer chooses."""

    kind: Literal["latent_dsa"] = "latent_dsa"  # pyright: ignore[reportIncompatibleVariableOverride]
    chunk_size: int = Field(default=128, gt=0, le=2**20)
    """Queries per block of the chunkwise paradigm; changes the cost, never the result."""
    backend: Literal["auto"] = "auto"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Kernel backend. Its only value: torch alone computes attention to chosen tokens."""

    @model_validator(mode="after")
    def _check_window(self) -> "LatentDsaConfig":
        if self.window is not None:
            raise ValueError("latent_dsa chooses among all tokens, got a window: leave it out, or use latent_attention")
        return self

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "LatentDsa":
        return LatentDsa(self, d_model)


class LatentDsa(LatentAttention):
    """Layer configured by `LatentDsaConfig`."""

    supports_context_parallel = False

    def __init__(self, config: LatentDsaConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        base = config.rope_base if config.positions == "rope" else None
        self.indexer = Indexer(d_model, config.index_heads, config.index_dim, base)
        self.indexer.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as latent attention, and the indexer as `Indexer`."""
        super().reset_parameters()
        if hasattr(self, "indexer"):  # not yet, when the base class calls it
            self.indexer.reset_parameters()

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        return 1, self.rank + self.rotary_dim + self.config.index_dim, 0

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> Mixed[CachedState]:
        q, latents = self._project(x, call)
        queries, to_values = self._absorb(q)
        index = self.indexer(x, call.positions(x, None if call.state is None else call.state.length), call)
        sizes = {"topk": self.config.topk, "value_dims": self.rank}
        output, final_state, *loss = index_attention(
            queries, latents, latents[..., :0], index, call, **sizes, scale=self.score_scale
        )
        if final_state is not None:
            final_state = cast_cache(final_state, self.dtype)  # under autocast, a new cache has a narrower dtype
        y = self.out_proj(torch.einsum("bthr,hvr->bthv", output, to_values).flatten(2))
        return MixResult(y, final_state, loss=loss[0]) if loss else (y, final_state)

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        options = {"chunk_size": self.config.chunk_size, "context": context, "topk": self.config.topk}
        per_pair = 2 * self.rank + self.rotary_dim
        heads = sparse_flops(paradigm, length, block_size=1, per_pair=per_pair, per_block=0, **options)
        index = sparse_flops(paradigm, length, block_size=1, per_pair=0, per_block=self.config.index_dim, **options)
        layers = [self.in_proj, self.out_proj, self.kv_up, self.indexer.proj, self.q_up]
        weights = sum(layer.weight.numel() for layer in layers if layer is not None)
        return 2 * length * weights + self.n_heads * heads + self.config.index_heads * index

    def kernels(self, dtype: torch.dtype) -> None:
        return None
