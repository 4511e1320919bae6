"""Tokens as chunks: which are computed at once, and how they lie for it.

A product of few rows costs more to call than to compute. So chunks that do not wait for each other are computed in
groups, and the chunks of a group, the batch and the heads are one dimension, G = n B H, as batched products want it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.packing import Stretch

ELEMENTS = 3 * 2**17
"""Of a group's keys and values at most on a CPU, where it is more than one chunk; larger ones leave its cache."""
UNCACHED = 2**26
"""The same on other devices, where memory alone bounds a group, and many small launches would take most of the time."""


class Group(NamedTuple):
    """Chunks of one length, side by side."""

    start: int
    """The first token."""
    length: int
    """Tokens of a chunk, m."""
    chunks: int = 1
    """Chunks, n."""

    @property
    def stop(self) -> int:
        """After the last token."""
        return self.start + self.chunks * self.length


def group_elements(device: torch.device, cached: int) -> int:
    """Elements of a group at most: `cached` on a CPU."""
    return cached if device.type == "cpu" else UNCACHED


def most_chunks(x: Tensor, chunk_size: int, width: int) -> int:
    """Chunks of a group at most, of tokens [B T H *] with so many elements per head."""
    batch, length, heads, _ = x.shape
    fitting = group_elements(x.device, ELEMENTS) // (batch * heads * chunk_size * width)
    return max(min(fitting, length // chunk_size), 1)


def groups(stretch: Stretch, chunk_size: int, most: int) -> list[Group]:
    """A stretch as groups of at most `most` chunks; the last chunk is by itself if it is ragged."""
    whole, ragged = divmod(stretch.stop - stretch.start, chunk_size)
    found = [
        Group(stretch.start + first * chunk_size, chunk_size, min(most, whole - first))
        for first in range(0, whole, most)
    ]
    return [*found, Group(stretch.stop - ragged, ragged)] if ragged else found


def capacity(length: int, chunk_size: int, cu_seqlens: Tensor | None) -> int:
    """Chunks there can be at most: documents end inside chunks."""
    return -(-length // chunk_size) + (0 if cu_seqlens is None else cu_seqlens.shape[0] - 1)


def cut(x: Tensor, group: Group) -> Tensor:
    """A group's tokens of [B T H *] as [n B H m *]; a view."""
    batch, _, heads, *rest = x.shape
    row, token, head, *inner = x.stride()
    # one operation: a step of a long loop is often as short as the call of an operation
    return x.as_strided(
        (group.chunks, batch, heads, group.length, *rest),
        (group.length * token, row, head, token, *inner),
        x.storage_offset() + group.start * token,
    )


def operand(x: Tensor, group: Group, dtype: torch.dtype, shared: int = 1) -> Tensor:
    """A group's tokens of [B T H D] as [G m D], each head's for so many; a view of one chunk of one row."""
    x = cut(x, group).to(dtype)
    return (x if shared == 1 else x[:, :, :, None].expand(-1, -1, -1, shared, -1, -1)).flatten(0, -3)


def store(out: Tensor, group: Group, x: Tensor) -> None:
    """The inverse of `operand`."""
    place = cut(out, group)
    place.copy_(x.view(place.shape))


def sum_after(a: Tensor, dim: int) -> Tensor:
    """out[j] = a[j+1] + .. + a[last] along `dim`."""
    out = torch.zeros_like(a)
    later = a.narrow(dim, 1, a.shape[dim] - 1)
    out.narrow(dim, 0, a.shape[dim] - 1).copy_(later.flip(dim).cumsum(dim).flip(dim))
    return out
