"""The sizes of kernel cases that are drawn: the usual and the rare."""

from functools import cache
from typing import Literal

import torch
from hypothesis import strategies as st

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.complex64)
"""The last two are for kernels to refuse."""

WIDTHS = ((1, 1), (1, 2), (3, 1), (2, 3), (5, 8), (16, 16), (20, 24))
"""Key and value widths."""

WIDE = ((33, 40), (40, 33), (64, 64), (72, 65), (64, 128), (130, 3), (3, 130), (257, 2), (2, 513))
"""Rare ones: a second tile, ragged or whole; the widths of layers; wider than kernels take."""

# one in three around the sizes of tiles
LENGTHS = st.integers(1, 9) | st.integers(10, 14) | st.sampled_from([15, 16, 17, 31, 33, 63, 64, 65, 70])
CHUNK_SIZES = st.integers(1, 10) | st.sampled_from([16, 17, 32, 40, 64])


@cache
def lengths_by_chunks(chunk_size: int) -> st.SearchStrategy[int]:
    """The usual lengths, and those of whole chunks, and one token more or less."""
    near = {n * chunk_size + more for n in range(1, min(70 // chunk_size, 4) + 1) for more in (-1, 0, 1)}
    return LENGTHS | LENGTHS | st.sampled_from(sorted(near - {0}) or [1])


HEADS = st.integers(1, 3)

Rare = Literal["wide", "heads", "rows", "chunks"]
"""What one case in a few has more of: wide keys or values; many heads; many rows or documents; chunks of `LARGE`."""

RARE: tuple[Rare | None, ...] = (*[None] * 36, "wide", "heads", "rows", "chunks")

LARGE = 128
"""A chunk as layers have it."""

LONG = st.sampled_from([LARGE, LARGE - 1, LARGE + 1, 200, 260])
"""Lengths for it."""

MANY = st.sampled_from([5, 9])
"""Heads or rows: above a small power of two."""
