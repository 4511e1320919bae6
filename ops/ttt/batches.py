"""Mini-batches of test-time training: a grid of slots in which every row and every document starts a batch.

Notation: b tokens per batch, N rows or packed documents, place = position mod b.

A row may begin in the middle of a batch. The grid has slots of b tokens, one batch each (one token each in the
recurrent paradigm); tokens that earlier segments have had, or that do not exist, are empty. Packed documents stand one
after another, and each begins with a slot of its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.call import Call


class Grid(NamedTuple):
    """Slots of a segment, C per row; C depends on shapes alone."""

    token: Tensor
    """Token in each place of a slot, [B C w]; T, one more than the last token, means empty."""
    place: Tensor
    """Place of each token in its batch, from 0, [B C w]."""
    complete: Tensor
    """True if a slot ends its batch, [B C]."""
    slot: Tensor
    """Index of each token among all places, [B T]."""
    document: Tensor | None
    """Packed document of each slot, [C]; None without packing."""
    first: Tensor | None
    """True for the first slot of a packed document, [C]."""
    last: Tensor | None
    """Last slot of each packed document, [N]; -1 if it is empty."""


def grid(call: Call, batch_size: int, length: int, batch: int, position: Tensor) -> Grid:
    """Arrange the tokens of a segment in slots.

    Args:
        call: the call.
        batch_size: rows of the segment, B.
        length: tokens of the segment, T.
        batch: tokens of a mini-batch.
        position: tokens processed before, [N].
    """
    device = position.device
    one = call.paradigm == "recurrent"
    width = 1 if one else batch
    place = position % batch
    inside = torch.zeros_like(place) if one else place  # places of the first slot that earlier segments have had
    spare = 0 if call.state is None or one else batch - 1
    if call.documents is None:
        count = -(-(length + spare) // width)
        slots = torch.arange(count, device=device)[None] * width
        document = first = last = None
        start, size = torch.zeros_like(place)[:, None], torch.full_like(place, length)[:, None]
        offset, skipped, begun = slots - inside[:, None], inside[:, None], place[:, None]
        slot = skipped + torch.arange(length, device=device)
    else:
        bounds = call.documents.cu_seqlens.to(torch.int64)
        sizes = bounds.diff()
        counts = torch.where(sizes > 0, (inside + sizes + width - 1) // width, 0)
        ends = counts.cumsum(0)
        count = length if one else length // batch + (1 + (spare > 0)) * call.documents.number
        index = torch.arange(count, device=device)
        document = torch.searchsorted(ends, index, right=True).clamp(max=len(sizes) - 1)
        number = index - (ends - counts)[document]
        first = (number == 0) & (index < ends[-1])
        last = torch.where(counts > 0, ends - 1, -1)
        start, size = bounds[:-1][document][None], sizes[document][None]
        skipped, begun = inside[document][None], place[document][None]
        offset = (number * width)[None] - skipped
        of_token = call.documents.of_token
        slot = torch.arange(length, device=device) + ((ends - counts) * width + inside - bounds[:-1])[of_token]
        slot = slot[None]
    relative = offset[..., None] + torch.arange(width, device=device)
    exists = (relative >= 0) & (relative < size[..., None])
    token = torch.where(exists, relative + start[..., None], length)
    places = (begun[..., None] + relative) % batch
    complete = exists[..., -1] & (places[..., -1] == batch - 1)
    return Grid(token, places, complete, slot.expand(batch_size, -1), document, first, last)
