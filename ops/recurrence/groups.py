"""Groups of chunks that are computed together, and their layout in memory.

A matrix product with few rows costs more to launch than to compute. Chunks that do not depend on each other are
therefore computed in groups of n. Batched products take the chunks of a group, the batch and the heads as one
dimension, G = n B H.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.packing import Stretch

CACHED_ELEMENTS = 3 * 2**17
"""Maximum number of elements of a group's keys and values on a CPU, so that they fit its cache; a single chunk may have
more."""
UNCACHED_ELEMENTS = 2**26
"""Maximum number of elements of a group on other devices, where only memory limits it and small launches are slow."""


class Group(NamedTuple):
    """Consecutive chunks of one length."""

    start: int
    """Index of the first token."""
    length: int
    """Chunk length m in tokens."""
    chunks: int = 1
    """Number of chunks n."""

    @property
    def stop(self) -> int:
        """Index after the last token."""
        return self.start + self.chunks * self.length


def group_elements(device: torch.device, cached: int) -> int:
    """Return the maximum number of elements of a group: `cached` on a CPU, UNCACHED_ELEMENTS elsewhere."""
    return cached if device.type == "cpu" else UNCACHED_ELEMENTS


def max_chunks(x: Tensor, chunk_size: int, width: int) -> int:
    """Return the maximum number of chunks of a group, for tokens x [B T H *] with `width` elements per head."""
    batch, length, heads, _ = x.shape
    fitting = group_elements(x.device, CACHED_ELEMENTS) // (batch * heads * chunk_size * width)
    return max(min(fitting, length // chunk_size), 1)


def groups(stretch: Stretch, chunk_size: int, max_per_group: int) -> list[Group]:
    """Split a stretch into groups of at most `max_per_group` chunks; a ragged last chunk is a group of its own."""
    whole, ragged = divmod(stretch.stop - stretch.start, chunk_size)
    result = [
        Group(stretch.start + first * chunk_size, chunk_size, min(max_per_group, whole - first))
        for first in range(0, whole, max_per_group)
    ]
    if ragged:
        result.append(Group(stretch.stop - ragged, ragged))
    return result


def capacity(length: int, chunk_size: int, cu_seqlens: Tensor | None) -> int:
    """Return the maximum number of chunks of a row; each document may end in a ragged chunk."""
    return -(-length // chunk_size) + (0 if cu_seqlens is None else cu_seqlens.shape[0] - 1)


def group_view(x: Tensor, group: Group) -> Tensor:
    """Return a group's tokens of x [B T H *] as a view [n B H m *]."""
    batch, _, heads, *rest = x.shape
    row, token, head, *inner = x.stride()
    # as_strided is one operation instead of several views: launching an operation may take as long as a step
    return x.as_strided(
        (group.chunks, batch, heads, group.length, *rest),
        (group.length * token, row, head, token, *inner),
        x.storage_offset() + group.start * token,
    )


def group_rows(x: Tensor, group: Group, dtype: torch.dtype, heads_per_key: int = 1) -> Tensor:
    """Return a group's tokens of x [B T H D] as [G m D] in a dtype, each head repeated `heads_per_key` times.

    The result is a view where the layout permits, such as for one chunk of one row.
    """
    x = group_view(x, group).to(dtype)
    return (x if heads_per_key == 1 else x[:, :, :, None].expand(-1, -1, -1, heads_per_key, -1, -1)).flatten(0, -3)


def store_group(out: Tensor, group: Group, x: Tensor) -> None:
    """Write a group's tokens x [G m D] to their place in out [B T H D]; the inverse of `group_rows`."""
    destination = group_view(out, group)
    destination.copy_(x.view(destination.shape))


def sum_after(a: Tensor, dim: int) -> Tensor:
    """Return the sums of later elements along `dim`: out[j] = a[j+1] + .. + a[last]."""
    out = torch.zeros_like(a)
    later = a.narrow(dim, 1, a.shape[dim] - 1)
    out.narrow(dim, 0, a.shape[dim] - 1).copy_(later.flip(dim).cumsum(dim).flip(dim))
    return out
