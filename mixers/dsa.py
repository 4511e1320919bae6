"""DeepSeek sparse attention, DSA (DeepSeek-V3.2, arXiv 2512.02556, §2), over softmax attention.

    q^I = x W_QI by index head, k^I = LayerNorm(x W_KI), both partly rotated by position;  w = x W_W
    I_ts = sum_i w_ti relu(q^I_ti . k^I_s) / sqrt(H_I D_I)         one index key per token
    S_t  = the topk tokens s <= t with the highest I_ts            the same for all heads; of equal ones, the earlier
    o_t  = sum_{s in S_t} softmax_s(q_t . k_s / sqrt(K)) v_s
    loss = sum_t KL(p_t || softmax_{s in S_t} I_ts)                p_t: weights of o_t, averaged over the heads

The indexer learns from the loss alone, and nothing else learns from it: its input x and p_t are detached. So the index
keys in a state have no gradient of x. Training adds the loss per token to the cross-entropy (the trait
`auxiliary_loss`). With topk tokens or fewer, S_t is everything, and the layer is softmax attention. The loss is that of
the paper's sparse stage. Its dense warm-up, in which the indexer learns with all else frozen, is the same with a large
topk.

The state is a KV cache of one head that holds the index keys too. The parallel paradigm computes all scores and masks
them; the other two read the chosen tokens. All score all index keys.

Differences from the paper: keys and values are those of softmax attention; `latent_dsa` has latents, as the paper. The
indexer's queries come from x, not from the latent of the queries. No Hadamard transform and no 8-bit numbers. Rotations
turn neighbouring dimensions, as everywhere here; DeepSeek's indexer turns halves.
"""

from typing import Any, Literal

from torch import Tensor

from ..ops.runtime.call import Call
from ..ops.runtime.paradigm import Paradigm
from ..ops.sparse_attention import index_attention, sparse_flops
from .parts.indexer import IndexedConfig, Indexer
from .parts.sparse_attention import SparseAttentionConfig, SparseAttentionMixer


class DsaConfig(IndexedConfig, SparseAttentionConfig):
    """DeepSeek sparse attention: softmax attention to the tokens that an indexer chooses."""

    kind: Literal["dsa"] = "dsa"

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Dsa":
        return Dsa(self, d_model)


class Dsa(SparseAttentionMixer):
    """Layer configured by `DsaConfig`."""

    def __init__(self, config: DsaConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        base = config.rope_base if config.positions == "rope" else None
        self.indexer = Indexer(d_model, config.index_heads, config.index_dim, base)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as softmax attention, and the indexer as `Indexer`."""
        super().reset_parameters()
        self.indexer.reset_parameters()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, others: dict[str, Tensor], x: Tensor, call: Call
    ) -> tuple[Any, ...]:
        index = self.indexer(x, self.positions(x, call), call)
        return index_attention(q, k, v, index, call, topk=self.config.topk, scale=self.score_scale)

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        widths = self.n_kv_heads * self.head_dim
        return 1, widths + self.config.index_dim, widths

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        options = {"chunk_size": self.config.chunk_size, "context": context, "topk": self.config.topk}
        heads = sparse_flops(paradigm, length, block_size=1, per_pair=2 * self.head_dim, per_block=0, **options)
        index = sparse_flops(paradigm, length, block_size=1, per_pair=0, per_block=self.config.index_dim, **options)
        weights = self.projection_weights + self.indexer.proj.weight.numel()
        return 2 * length * weights + self.n_heads * heads + self.config.index_heads * index
