"""The sizes of kernel cases, and how tensors lie in memory: the usual, the rare, and what is not left to chance."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from hypothesis import strategies as st

Layout = Literal["contiguous", "fused", "heads_first", "sliced", "expanded"]
"""How tensors lie in memory. Fused: queries, keys and values are slices of one projection, the others transposed. Heads
first: heads before tokens, and of a state keys before heads. Sliced: every tensor is a slice of one with more features,
and a state's rows are parts of larger ones; what lies between is NaN. Expanded: rows of a state, and gradients from
above, are one number repeated."""

LAYOUTS: tuple[Layout, ...] = ("contiguous", "fused", "heads_first", "sliced", "expanded")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.complex64)
"""The last two are for kernels to refuse."""

WIDTHS = ((1, 1), (1, 2), (3, 1), (2, 3), (5, 8), (16, 16), (20, 24))
"""Key and value widths."""

WIDE = ((33, 40), (40, 33), (64, 64), (72, 65), (64, 128), (130, 3), (3, 130), (257, 2), (2, 513))
"""Rare ones: a second tile, ragged or whole; the widths of layers; wider than kernels take."""

# one in three around the sizes of tiles
LENGTHS = st.integers(1, 9) | st.integers(10, 14) | st.sampled_from([15, 16, 17, 31, 33, 63, 64, 65, 70])
CHUNK_SIZES = st.integers(1, 10) | st.sampled_from([16, 17, 32, 40, 64])
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

CROWD = (0, *[0, 1, 2, 0, 0, 1] * 50, 3, 0, 0)
"""Lengths of documents, more than a byte counts: empty ones first, last and side by side."""

_BATCH: Mapping[str, Any] = {"lengths": (3,) * 9, "n_heads": 9, "key_width": 3, "value_width": 5}

FIXED: tuple[Mapping[str, Any], ...] = (
    {"lengths": (17,), "key_width": 33, "value_width": 72, "layout": "sliced", "chunk_size": 16},
    {**_BATCH, "layout": "heads_first"},
    {**_BATCH, "log_decay": "H"},
    {**_BATCH, "log_decay": "B T H", "layout": "fused"},
    {"lengths": (260,), "key_width": 5, "value_width": 8, "chunk_size": LARGE, "layout": "fused"},
    {"lengths": CROWD, "packed": True, "key_width": 2, "value_width": 3, "chunk_size": 32},
    {"lengths": (140,), "key_width": 2, "value_width": 3, "chunk_size": 2},
    {"lengths": (9, 9), "key_width": 130, "value_width": 40, "layout": "heads_first"},
    {"lengths": (0, 129, 0, 0, 131, 0), "packed": True, "key_width": 3, "value_width": 2, "chunk_size": LARGE},
)
"""What cases that are not left to chance hold, the first ones first where few are asked for."""
