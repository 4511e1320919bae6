"""Mixture of block attention, MoBA (Moonshot AI, arXiv 2502.13189, Eq. 2 to 6).

    blocks of L tokens from a document's first token on; token n is in block b(n) = n // L
    score_nj = q_n . mean of the keys of block j          for the complete blocks j < b(n)
    A_n = b(n) and the topk - 1 blocks of the highest scores, by head
    o_n = sum_m softmax_m(q_n . k_m / sqrt(K)) v_m        over the keys m <= n of the blocks in A_n

It has the parameters of softmax attention and is interchangeable with it: if topk covers all blocks of a text, they are
the same function. A document begins a new block, and the own block is always read, so with topk = 1 a token sees its
own block alone. Of equal scores, the earlier block wins. The choice has no gradient, as in the paper.

The parallel paradigm computes all scores and masks them. The other two read the chosen blocks only. A decoding step
also sums up the cached keys of all blocks, since their means are not stored.

Differences from the authors' code: their kernel runs full attention for topk = 1, and their decoding reads all keys;
here all paradigms compute the same function. Scores are compared in fixed point of 23 bits or more
(ops/sparse_attention).
"""

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ..ops.attention import Cache
from ..ops.runtime.call import Call
from ..ops.runtime.paradigm import Paradigm
from ..ops.sparse_attention import block_attention, sparse_flops
from .parts.sparse_attention import SparseAttentionConfig, SparseAttentionMixer


class MobaConfig(SparseAttentionConfig):
    """Mixture of block attention: softmax attention to the own block and to the best earlier blocks."""

    small = {"block_size": 2, "topk": 2}  # noqa: RUF012
    kind: Literal["moba"] = "moba"
    block_size: int = Field(default=64, gt=0, le=2**20, examples=[2, 3])
    """Tokens of a block."""
    topk: int = Field(default=4, gt=0, examples=[2, 1])
    """Blocks that a query reads, its own included."""

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Moba":
        return Moba(self, d_model)


class Moba(SparseAttentionMixer):
    """Layer configured by `MobaConfig`."""

    def __init__(self, config: MobaConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.reset_parameters()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, others: dict[str, Tensor], x: Tensor, call: Call
    ) -> tuple[Float[Tensor, "B T H V"], Cache | None]:
        sizes = {"block_size": self.config.block_size, "topk": self.config.topk}
        return block_attention(q, k, v, call, **sizes, scale=self.score_scale)

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        return 2 * length * self.projection_weights + self.n_heads * sparse_flops(
            paradigm,
            length,
            block_size=self.config.block_size,
            chunk_size=self.config.chunk_size,
            context=context,
            per_pair=2 * self.head_dim,
            per_block=self.head_dim if self.config.topk > 1 else 0,
            topk=self.config.topk,
        )
