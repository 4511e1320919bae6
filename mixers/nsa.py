"""Native sparse attention, NSA (DeepSeek, arXiv 2502.11089, Eq. 5 to 12).

    blocks of L tokens from a document's first token on; k_j, v_j: the means of block j, visible once it is complete
    p_nj = softmax_j(q_n . k_j / sqrt(K))        over the complete blocks
    o_1  = sum_j p_nj v_j                        0 before the first complete block
    o_2  = softmax attention to the keys m <= n of the topk blocks with the highest sum of p_nj over the query heads of
           a key head, which share their choice; the own, the first and the previous block are always among them
    o_3  = softmax attention to the last `window` keys
    g = sigmoid(x W_B)                           three numbers per head
    y = (g_1 o_1 + g_2 o_2 + g_3 o_3) W_O

The choice has no gradient; the means learn through their own branch. The sums of p_nj are compared in float32; of equal
sums, the earlier block wins. Sums also count as equal if they differ by less than 1e-7 of their size (scores near 0) or
are all below 1e-45 (scores more than 100 below the best). With queries and keys a thousandth of the usual size, the
output differs by 10 % from that of an exact comparison, with smaller ones by 30 %.

The parallel paradigm computes all scores and masks them. The other two read the means of all blocks, and the keys that
were chosen. A decoding step also sums up the cached keys and values of all blocks, since their means are not stored.

Differences from the paper: blocks are pooled by means, not by an MLP, and the three branches share keys and values, as
in fla. The pooled blocks are those of the choice: they do not overlap and have no size of their own. Key heads may have
any number of query heads, where the authors' kernel needs 16. If topk is below 3, the own block comes first, then the
document's first.
"""

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ..ops.attention import Cache
from ..ops.runtime.call import Call
from ..ops.runtime.paradigm import Paradigm
from ..ops.sparse_attention import native_sparse_attention, sparse_flops
from .parts.sparse_attention import SparseAttentionConfig, SparseAttentionMixer

BRANCHES = 3
"""Branches of the attention: pooled blocks, chosen blocks, window."""


class NsaConfig(SparseAttentionConfig):
    """Native sparse attention: the gated sum of attention to pooled blocks, to the best blocks and to a window."""

    small = {"block_size": 2, "topk": 3, "window": 2}  # noqa: RUF012
    kind: Literal["nsa"] = "nsa"
    block_size: int = Field(default=64, gt=0, le=2**20, examples=[3])
    """Tokens of a block."""
    topk: int = Field(default=16, gt=0, examples=[2, 1])
    """Blocks that a query reads, the own, the first and the previous one included."""
    window: int = Field(default=512, gt=0, examples=[5])
    """Keys of the third branch, a query's own included."""

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Nsa":
        return Nsa(self, d_model)


class Nsa(SparseAttentionMixer):
    """Layer configured by `NsaConfig`."""

    def __init__(self, config: NsaConfig, d_model: int) -> None:
        super().__init__(config, d_model, branches=BRANCHES * config.n_heads)
        self.reset_parameters()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, others: dict[str, Tensor], x: Tensor, call: Call
    ) -> tuple[Float[Tensor, "B T H V"], Cache | None]:
        gates = others["branches"].unflatten(-1, (self.n_heads, BRANCHES)).sigmoid()
        sizes = {"block_size": self.config.block_size, "topk": self.config.topk, "window": self.config.window}
        return native_sparse_attention(q, k, v, gates, call, **sizes, scale=self.score_scale)

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        return 2 * length * self.projection_weights + self.n_heads * sparse_flops(
            paradigm,
            length,
            block_size=self.config.block_size,
            chunk_size=self.config.chunk_size,
            context=context,
            per_pair=2 * self.head_dim,
            per_block=3 * self.head_dim,  # the choice; scores and values of the first branch
            topk=self.config.topk,
            window=self.config.window,
        )
