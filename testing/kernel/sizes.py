"""Usual and rare sizes of the drawn kernel cases, most of them as strategies of hypothesis."""

from functools import cache
from typing import Literal

import torch
from hypothesis import strategies as st

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.complex64)
"""Dtypes of inputs; kernels must refuse the last two."""

WIDTHS = ((1, 1), (1, 2), (3, 1), (2, 3), (5, 8), (16, 16), (20, 24))
"""Usual key and value widths."""

WIDE = ((33, 40), (40, 33), (64, 64), (72, 65), (64, 128), (130, 3), (3, 130), (257, 2), (2, 513))
"""Rare key and value widths: two tiles, the second partial or full; widths of layers; too wide for some kernels."""

# one length in three is close to the size of a tile
LENGTHS = st.integers(1, 9) | st.integers(10, 14) | st.sampled_from([15, 16, 17, 31, 33, 63, 64, 65, 70])
CHUNK_SIZES = st.integers(1, 10) | st.sampled_from([16, 17, 32, 40, 64])


@cache
def lengths_by_chunks(chunk_size: int) -> st.SearchStrategy[int]:
    """Return a strategy for lengths: mostly usual ones, otherwise multiples of the chunk length, give or take one."""
    near = {n * chunk_size + offset for n in range(1, min(70 // chunk_size, 4) + 1) for offset in (-1, 0, 1)}
    return LENGTHS | LENGTHS | st.sampled_from(sorted(near - {0}) or [1])


HEADS = st.integers(1, 3)

Rare = Literal["wide", "heads", "rows", "chunks"]
"""Unusual size of a case: wide keys or values, many heads, many rows or documents, or chunks of `LARGE` tokens."""

RARE: tuple[Rare | None, ...] = (*[None] * 36, "wide", "heads", "rows", "chunks")
"""Choices for the unusual size: one case in ten has one."""

LARGE = 128
"""Chunk length of real layers, in tokens."""

LONG = st.sampled_from([LARGE, LARGE - 1, LARGE + 1, 200, 260])
"""Lengths for chunks of `LARGE` tokens."""

MANY = st.sampled_from([5, 9])
"""Unusual numbers of heads or rows, one above a power of two."""
