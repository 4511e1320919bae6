"""Softmax attention of queries over the keys that were chosen for them (notation of api.py)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..attention.inputs import AttentionInputs
from ..attention.kv_cache import KeyValues
from ..attention.scores import attend_by_scores
from ..recurrence.token_loop import no_autocast
from .layout import Layout


class Keys(NamedTuple):
    """Keys and values that a segment's queries may choose from."""

    keys: Float[Tensor, "B M G K"]
    values: Float[Tensor, "B M G V"]
    scale: float
    """Number that query-key products are multiplied by."""

    @classmethod
    def of(cls, x: AttentionInputs, kv: KeyValues) -> "Keys":
        """Return the keys and values of a segment and of its cache."""
        return cls(kv.keys, kv.values, x.scale)


class Selection(NamedTuple):
    """Keys chosen for each query by each of R choosers; a chooser's choice is shared by H / R query heads."""

    ranks: Int[Tensor, "B R T n"]
    """Ranks of the chosen keys; each visible rank at most once."""
    visible: Bool[Tensor, "B R T n"]
    """True where the entry exists: ranks elsewhere are meaningless."""


def block_selection(
    blocks: Int[Tensor, "B R T k"], exists: Bool[Tensor, "B R T k"], layout: Layout, block_size: int
) -> Selection:
    """Return the keys of chosen blocks up to each query's own key."""
    batch_size = blocks.shape[0]
    clamped = blocks.clamp(0, layout.starts.shape[1] - 1)
    starts = layout.starts.expand(batch_size, -1).gather(1, clamped.flatten(1)).view(blocks.shape)
    ranks = starts[..., None] + torch.arange(block_size, device=blocks.device)
    in_document = (ranks >= layout.first[:, None, :, None, None]) & (ranks <= layout.own[:, None, :, None, None])
    return Selection(ranks.flatten(-2), (exists[..., None] & in_document).flatten(-2))


def window_selection(layout: Layout, window: int, batch_size: int) -> Selection:
    """Return the last `window` keys of each query, its own included."""
    ranks = layout.own[..., None] - torch.arange(window, device=layout.own.device)
    ranks = ranks[:, None].expand(batch_size, -1, -1, -1)
    return Selection(ranks, ranks >= layout.first[:, None, :, None])


def attend_dense(
    q: Float[Tensor, "B T H K"], selection: Selection, source: Keys, layout: Layout
) -> Float[Tensor, "B T H V"]:
    """Compute all scores and mask those of keys that were not chosen: the definition."""
    slots = source.keys.shape[1]
    chosen = layout.slots(selection.ranks.clamp(0, slots - 1))
    mask = chosen.new_zeros(*chosen.shape[:-1], slots + 1, dtype=torch.bool)
    mask.scatter_(-1, torch.where(selection.visible, chosen, slots), True)
    mask = mask[..., :slots].repeat_interleave(q.shape[2] // mask.shape[1], dim=1)
    x = AttentionInputs(q, q, q, source.scale, None, None, False, 1)
    return attend_by_scores(x, q, source.keys, source.values, mask, None)


def attend_gathered(
    q: Float[Tensor, "B T H K"], selection: Selection, source: Keys, layout: Layout
) -> Float[Tensor, "B T H V"]:
    """Gather the chosen keys and values of each query, and compute their scores alone."""
    weights, index = selected_weights(q, selection, source, layout)
    with no_autocast(q.device):
        output = weights @ _gather(source.values, index).to(weights.dtype)
    return output.permute(0, 2, 1, 3, 4).flatten(2, 3).to(q.dtype)


def selected_weights(
    q: Float[Tensor, "B T H K"], selection: Selection, source: Keys, layout: Layout
) -> tuple[Float[Tensor, "B R T H/R n"], Int[Tensor, "B R T n"]]:
    """Return the softmax weights of the chosen keys, float32 or wider, and their indices in `source`, flattened."""
    batch_size, slots, groups, _ = source.keys.shape
    ranks, visible = selection
    if ranks.shape[1] < groups:  # one choice for several key heads
        ranks, visible = (x.repeat_interleave(groups // x.shape[1], dim=1) for x in selection)
    choosers = ranks.shape[1]
    group = torch.arange(choosers, device=q.device) * groups // choosers
    row = torch.arange(batch_size, device=q.device)
    chosen = layout.slots(ranks.clamp(0, slots - 1))
    index = (row[:, None, None, None] * slots + chosen) * groups + group[:, None, None]
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = q.unflatten(2, (choosers, -1)).permute(0, 2, 1, 3, 4).to(wide) * source.scale
    with no_autocast(q.device):
        scores = queries @ _gather(source.keys, index).to(wide).mT
    return scores.masked_fill(~visible[..., None, :], -torch.inf).softmax(-1), index


def _gather(x: Float[Tensor, "B M G K"], index: Int[Tensor, "B R T n"]) -> Float[Tensor, "B R T n K"]:
    """Return vectors by their index among all vectors of x."""
    return x.flatten(0, 2).index_select(0, index.flatten()).unflatten(0, index.shape)
