"""Selection of tokens by an indexer: DeepSeek Sparse Attention (notation of api.py; I index heads, D index width).

    I_ts = sum_i w_ti relu(q^I_ti . k^I_s)              one index key per token, shared by the index heads
    S_t  = the topk best s <= t by I_ts
    loss_t = KL(p_t || softmax_s I_ts) over s in S_t     p_t: attention weights over S_t, averaged over all heads

The output has no gradient of the index tensors, and the loss has none of q, k and v.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..attention.inputs import AttentionInputs
from ..attention.kv_cache import KeyValues
from ..recurrence.token_loop import no_autocast
from .attend import Keys, Selection, block_selection, selected_weights
from .layout import Layout, between
from .scores import exact_products, select_topk
from .segments import Attend, Rule


class Index(NamedTuple):
    """Tensors of the indexer."""

    q: Float[Tensor, "B T I D"]
    """Index queries."""
    k: Float[Tensor, "B T D"]
    """Index keys."""
    weights: Float[Tensor, "B T I"]
    """Weights of the index heads."""


class StoredKeys(NamedTuple):
    """Widths of what a cache of one head holds of each token: [keys of G heads, index key], and values of G heads."""

    groups: int
    key_dim: int
    value_dims: int | None
    """Number of leading key dimensions that are the values; None if values are stored."""

    def split(self, kv: KeyValues, scale: float) -> tuple[Keys, Float[Tensor, "B M D"]]:
        """Return keys and values by head, and the index keys."""
        stored, index_keys = kv.keys[:, :, 0].tensor_split([self.groups * self.key_dim], dim=-1)
        keys = stored.unflatten(-1, (self.groups, self.key_dim))
        if self.value_dims is not None:
            return Keys(keys, keys[..., : self.value_dims], scale), index_keys
        return Keys(keys, kv.values[:, :, 0].unflatten(-1, (self.groups, -1)), scale), index_keys


def index_rule(
    x: AttentionInputs, kv: KeyValues, layout: Layout, stored: StoredKeys, topk: int, *, with_loss: bool
) -> Rule:
    """Return the rule of DSA, which reads queries, index queries and weights; with the loss of each token if wanted.

    Tokens are blocks of one.
    """
    source, index_keys = stored.split(kv, x.scale)
    if layout.order is not None:
        index_keys = index_keys.gather(1, layout.order[..., None].expand(index_keys.shape))

    def attend_to_best(queries: Sequence[Tensor], layout: Layout, attend: Attend) -> tuple[Tensor, ...]:
        q, index_q, weights = queries
        number = min(layout.starts.shape[1], index_keys.shape[1])
        scores = index_scores(index_q, index_keys[:, :number], weights)
        earlier = between(layout, layout.complete)[..., :number]
        best, exist = select_topk(scores[:, None], earlier, min(topk, number))
        selection = block_selection(best, exist, layout, 1)
        output = attend(q, selection, source, layout)
        if not with_loss:
            return (output,)
        return output, _index_loss(Index(index_q, index_keys, weights), q, selection, source, layout)

    return attend_to_best


@torch.no_grad()
def index_scores(
    q: Float[Tensor, "B T I D"], k: Float[Tensor, "B M D"], weights: Float[Tensor, "B T I"]
) -> Float[Tensor, "B T M"]:
    """Return the scores of the indexer in float64, head by head in order."""
    scores = q.new_zeros(q.shape[0], q.shape[1], k.shape[1], dtype=torch.float64)
    for head, weight in enumerate(weights.double().unbind(-1)):
        scores = scores + weight[..., None] * exact_products(q[:, :, head], k).relu()
    return scores


def _index_loss(index: Index, q: Tensor, selection: Selection, source: Keys, layout: Layout) -> Float[Tensor, "B T"]:
    """Return the divergence of the indexer's distribution over the chosen tokens from that of the attention."""
    with torch.no_grad():
        target = selected_weights(q, selection, source, layout)[0].mean((1, 3))
    ranks, visible = (y[:, 0] for y in selection)
    rows = torch.arange(len(ranks), device=q.device)[:, None, None]
    keys = index.k[rows, ranks.clamp(0, index.k.shape[1] - 1)].to(target.dtype)
    with no_autocast(q.device):
        products = index.q.to(target.dtype) @ keys.mT  # [B T I n]
        scores = (products.relu() * index.weights.to(target.dtype)[..., None]).sum(2)
        predicted = scores.masked_fill(~visible, -torch.inf).log_softmax(-1).masked_fill(~visible, 0)
    return (torch.xlogy(target, target) - target * predicted).sum(-1)
