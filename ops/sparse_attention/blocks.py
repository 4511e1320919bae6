"""Choices of blocks: MoBA's and NSA's (notation of api.py)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..attention.inputs import AttentionInputs
from ..attention.kv_cache import KeyValues
from ..attention.scores import group_heads, matmul, ungroup_heads
from ..recurrence.token_loop import no_autocast
from .attend import Keys, block_selection, window_selection
from .layout import Layout, between, block_means
from .scores import exact_products, exact_softmax, select_topk, tree_sum
from .segments import Attend, Rule


def select_own_and_topk(x: AttentionInputs, kv: KeyValues, layout: Layout, block_size: int, topk: int) -> Rule:
    """Return the rule of MoBA: each head attends to its own block and to the topk - 1 best complete ones before it."""
    source = Keys.of(x, kv)
    means = block_means(_wide(kv.keys.detach()), layout, block_size) if topk > 1 else None

    def attend_to_best(queries: Sequence[Tensor], layout: Layout, attend: Attend) -> tuple[Tensor]:
        (q,) = queries
        blocks = layout.own_block[:, None, :, None].expand(q.shape[0], q.shape[2], -1, 1)
        exists = torch.ones_like(blocks, dtype=torch.bool)
        number = layout.starts.shape[1]
        if means is not None:
            earlier = between(layout, layout.own_block)
            best, best_exist = select_topk(_products(q, means[:, :number]), earlier, min(topk, number) - 1)
            blocks, exists = torch.cat((blocks, best), dim=-1), torch.cat((exists, best_exist), dim=-1)
        return (attend(q, block_selection(blocks, exists, layout, block_size), source, layout),)

    return attend_to_best


def native_sparse_rule(
    x: AttentionInputs,
    kv: KeyValues,
    layout: Layout,
    block_size: int,
    topk: int,
    window: int,
) -> Rule:
    """Return the rule of NSA: the gated sum of attention to pooled blocks, to chosen blocks and to a window.

    The rule reads queries and gates, [B T H 3].
    """
    source = Keys.of(x, kv)
    means = [block_means(_wide(y), layout, block_size) for y in (kv.keys, kv.values)]

    def attend_in_branches(queries: Sequence[Tensor], layout: Layout, attend: Attend) -> tuple[Tensor]:
        q, gates = queries
        number = layout.starts.shape[1]
        keys, values = (y[:, :number] for y in means)
        complete = between(layout, layout.complete)
        weights = exact_softmax(_products(q, keys.detach()) * x.scale, complete)
        # by key head; `select_topk` takes sums that are equal in float32 for equal, such as those below 1e-45
        shared = tree_sum(weights.unflatten(1, (keys.shape[2], -1)), dim=2)
        best, exist = select_topk(*_with_forced(shared, complete, layout), min(topk, number))
        chosen = block_selection(best, exist, layout, block_size)
        recent = window_selection(layout, min(window, kv.keys.shape[1]), q.shape[0])
        of_means, of_best, of_recent = gates[..., None].unbind(-2)
        output = of_means * _attend_to_means(q, keys, values, complete, x.scale)
        output = output + of_best * attend(q, chosen, source, layout)
        return (output + of_recent * attend(q, recent, source, layout),)

    return attend_in_branches


def _with_forced(scores: Tensor, complete: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return scores above all weights for the own, the first and the previous block, in this order; and all allowed."""
    number = torch.arange(scores.shape[-1], device=scores.device)
    own, first = (block[:, None, :, None] for block in (layout.own_block, layout.first_block))
    previous = number == own - 1
    forced = ((number == first) | previous | (number == own)) & (number >= first)
    scores = torch.where(previous, 2.0, scores)
    scores = torch.where(number == first, 3.0, scores)
    return torch.where(number == own, 4.0, scores), complete | forced


def _attend_to_means(
    q: Float[Tensor, "B T H K"],
    keys: Float[Tensor, "B P G K"],
    values: Float[Tensor, "B P G V"],
    complete: Bool[Tensor, "_ 1 T P"],
    scale: float,
) -> Float[Tensor, "B T H V"]:
    """Compute softmax attention to the means of complete blocks; 0 where there is none."""
    groups = keys.shape[2]
    with no_autocast(q.device):
        queries = group_heads(q.transpose(1, 2).to(keys.dtype) * scale, groups)
        scores = ungroup_heads(matmul(queries, keys.permute(0, 2, 3, 1)), q.shape[2])
        # a softmax over nothing would be NaN
        weights = scores.masked_fill(~complete, torch.finfo(scores.dtype).min).softmax(-1) * complete
        output = ungroup_heads(matmul(group_heads(weights, groups), values.transpose(1, 2)), q.shape[2])
    return output.transpose(1, 2).to(q.dtype)


def _products(q: Float[Tensor, "B T H K"], keys: Float[Tensor, "B P G K"]) -> Float[Tensor, "B H T P"]:
    """Return the products of queries with the keys of their group, by `exact_products`."""
    queries = q.detach().transpose(1, 2).unflatten(1, (keys.shape[2], -1))
    return exact_products(queries, keys.transpose(1, 2)[:, :, None]).flatten(1, 2)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
