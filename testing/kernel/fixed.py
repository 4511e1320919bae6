"""Fixed kernel cases, each as a mapping of the fields of a case.

A case with a key `needs_grad` runs only with gradients (True), or only without (False); any other case may do either.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .sizes import LARGE

Fields = Mapping[str, Any]

CROWD = (0, *[0, 1, 2, 0, 0, 1] * 50, 3, 0, 0)
"""Lengths of more documents than a byte can count; empty ones are first, last and side by side."""

ROWS = 130
"""Number of rows that, with two heads, need more programs than a byte can count."""

_BATCH: Fields = {"lengths": (3,) * 9, "n_heads": 9, "key_width": 3, "value_width": 5}
_SMALL: Fields = {"n_heads": 2, "key_width": 2, "value_width": 3, "chunk_size": 3}

PROGRAMS = 2**16
"""Product of heads and rows that exceeds the limit of a CUDA grid's second and third dimension."""

FIXED: tuple[Fields, ...] = (
    # the largest case is first, because the first one runs only with the full number of examples
    {"lengths": (1, 1), "n_heads": PROGRAMS // 2, "key_width": 2, "value_width": 3, "chunk_size": 3},
    {"lengths": (17,), "key_width": 33, "value_width": 72, "layout": "sliced", "chunk_size": 16},
    {**_BATCH, "layout": "heads_first"},
    {**_BATCH, "log_decay": "H"},
    {**_BATCH, "log_decay": "B T H", "layout": "fused"},
    # the gradient of a head's decay is a sum over more blocks than a byte can count
    {**_BATCH, "lengths": (65,) * 60, "n_heads": 2, "chunk_size": 16, "log_decay": "H"},
    {"lengths": (260,), "key_width": 5, "value_width": 8, "chunk_size": LARGE, "layout": "fused"},
    {"lengths": CROWD, "packed": True, "key_width": 2, "value_width": 3, "chunk_size": 32},
    {"lengths": (140,), "key_width": 2, "value_width": 3, "chunk_size": 2},
    {"lengths": (9, 9), "key_width": 130, "value_width": 40, "layout": "heads_first"},
    {"lengths": (9, 9), "key_width": 3, "value_width": 150},
    {"lengths": (0, 129, 0, 0, 131, 0), "packed": True, "key_width": 3, "value_width": 2, "chunk_size": LARGE},
    {**_BATCH, "lengths": (5, 5), "n_heads": 3, "layout": "mixed"},
    {"lengths": (3,) * ROWS, "n_heads": 2, "key_width": 2, "value_width": 3, "chunk_size": 3},
)
"""Fixed cases of every op."""

TAILS = (1, 5, 6, 7)
"""Lengths in tokens for chunks of 3: a single chunk of one token, and last chunks of two, three and one tokens."""

ABOVE, BELOW = (1e-3, 4.0, 1e4), (1.0, 1e-3, 1e-3)
"""Sizes of queries, keys and values whose sums of keys times values are above float16's range (`ABOVE`), or below its
normal numbers (`BELOW`)."""

_RANGE = (((9,), 4), ((9,), 16), ((1,), 4), ((3, 0, 9), 4))
"""Lengths and chunk lengths for the cases at the limits of float16."""

STATES: tuple[Fields, ...] = tuple(
    {
        **_SMALL,
        "lengths": lengths,
        "packed": len(lengths) > 1,
        "chunk_size": chunk_size,
        "dtype": torch.float16,
        "sizes": sizes,
        "final_state": True,
        "needs_grad": False,
    }
    for sizes in (ABOVE, BELOW)
    for lengths, chunk_size in _RANGE
)
"""Cases whose float32 states do not fit into float16: above its range, and below its normal numbers."""


WIDE: tuple[Fields, ...] = tuple(
    {**_SMALL, "lengths": (9,), "dtype": torch.float16, "sizes": (1e3, 1.0, 30.0), "scale": 1.0}
    | {"wide_output": True, "needs_grad": False, "chunk_size": chunk_size}
    for chunk_size in (3, 16)
)
"""Cases whose float32 outputs are above float16's range, while the states are within it."""

SLOW: Fields = {**_SMALL, "lengths": (300,), "chunk_size": 64, "dtype": torch.bfloat16, "needs_grad": False}
"""Case of a long row: decays near 1 that are rounded to 16 bits would change the state noticeably."""

RESETS: tuple[Fields, ...] = tuple(
    {**_SMALL, "lengths": (7,), "log_decay": log_decay, "resets": (token,), "needs_grad": needs_grad}
    for log_decay, parity in (("B T H", 0), ("B T H K", 1))
    for token, needs_grad in ((0, parity == 1), (2, parity == 0), (3, parity == 1), (6, parity == 0), (2, parity == 1))
)
"""Cases with a reset on the first token, on the last token, and on either side of a chunk's end."""


LONG: Fields = {"n_heads": 1, "key_width": 2, "value_width": 2, "chunk_size": 64, "log_decay": "B T H"}
LONG = {**LONG, "lengths": (4096,), "weakest": 0.5, "needs_grad": False}
"""Case of a long row: a running sum of all its log-decays loses the digits of a single one."""


def _windows() -> Iterator[Fields]:
    """Yield the cases of `WINDOWS`."""
    for window in range(1, 7):  # the segment has 5 tokens in chunks of 3
        fields = {**_SMALL, "lengths": (5,), "window": window}
        yield fields | {"initial_state": False, "final_state": False}
        yield fields | {"initial_state": False, "final_state": True, "needs_grad": False}
        for read in (window - 1, window, window + 1):
            cache, capacity = ("growing", read + 1) if (window + read) % 2 else ("ring", window)
            yield fields | {
                "initial_state": True,
                "cache": cache,
                "reads": (read,),
                "capacity": capacity,
                "needs_grad": False,
            }
    yield {**_SMALL, "lengths": (4, 0, 5, 6, 1), "packed": True, "window": 5}
    several: Fields = {**_SMALL, "lengths": (300,), "chunk_size": LARGE, "initial_state": False}
    for window in (40, 150):  # without decays and other scores: a kernel may take another path then
        yield several | {"window": window, "log_decay": None, "scores": ()}
    yield several | {"window": 150}
    for read in (2**24 + 1, 2**31 + 3):  # float32 cannot represent the first, int32 not the second
        for lengths in ((2, 2), (1,), (3, 0)):
            ring = {"window": 4, "initial_state": True, "cache": "ring", "capacity": 4, "packed": 0 in lengths}
            yield {**_SMALL, **ring, "lengths": lengths, "reads": (read, 2)[: len(lengths)], "needs_grad": False}


WINDOWS = tuple(_windows())
"""Cases with windows: around the lengths of chunks and of the segment, with caches of about the window's length; over
several blocks; and after more tokens than an int32 can count."""

_SCORED: Fields = {**_SMALL, "key_width": 5, "lengths": (9,), "log_decay": None, "scores": ()}

SCORES: tuple[Fields, ...] = tuple(
    {**_SCORED, **scores, **context}
    for scores in (
        {"sizes": (400.0, 1.0, 1.0)},
        {"sizes": (-1e4, 1.0, 1.0)},
        {"sizes": (4.0, 1.0, 1.0), "loud": (0,)},
        {"sizes": (4.0, 1.0, 1.0), "loud": (8,)},
        {"sizes": (200.0, 200.0, 1.0), "scale": 2.0**-14, "dtype": torch.float16},
    )
    for context in (
        {"window": None, "initial_state": False, "final_state": False},
        {"window": 4, "initial_state": False},
        {"window": None, "initial_state": True},
        {"lengths": (3, 0, 6), "packed": True},
    )
)
"""Cases with extreme scores, in this order: of both signs, and too large to exponentiate even in float64; all below
-10,000; one key that outweighs all others, visible to all queries or only to the last; and products of queries and keys
that fit into float16 only after scaling. Each with and without a window, a state and packed documents."""


def endings(decays: Sequence[str | None], leaves: Callable[[str | None], list[str]]) -> Iterator[Fields]:
    """Yield cases with last chunks of every length, and cases in which only some inputs have gradients.

    The last chunks are combined with the kinds of log-decays, and with the outputs that receive an upstream gradient.
    Either a single input has a gradient, as in a frozen model (with a trained prompt, for example), or all but one.

    Args:
        decays: kinds of log-decays.
        leaves: returns the names of the inputs that have gradients, for a kind of log-decay.
    """
    upstreams = ("both", "output", "state")
    for number, (length, log_decay) in enumerate(itertools.product(TAILS, decays)):
        fields = {**_SMALL, "lengths": (length,), "log_decay": log_decay, "final_state": True}
        yield fields | {"initial_state": number % 2 == 0, "needs_grad": False}
        for offset, upstream in enumerate(upstreams if length % 3 == 1 else upstreams[1:]):
            initial_state = (number + offset) % 2 == 0
            yield fields | {"upstream": upstream, "initial_state": initial_state, "needs_grad": True}
    for log_decay, upstream in itertools.product(decays, upstreams[1:]):
        fields = {**_SMALL, "lengths": (*TAILS, 0), "packed": True, "log_decay": log_decay, "final_state": True}
        yield fields | {"upstream": upstream, "needs_grad": True}
    for kind, log_decay in enumerate(decays):
        fields = {**_SMALL, "lengths": (7,), "log_decay": log_decay, "initial_state": True, "needs_grad": True}
        yield fields | {"final_state": False}
        names = leaves(log_decay)
        for number, name in enumerate(names):
            others = tuple(other for other in names if other != name)
            choices = ((name,), others)
            # alternate between the input alone and all others; for the last input, a state, take both
            for grad in choices if number == len(names) - 1 else choices[(number + kind) % 2 :][:1]:
                # equal widths, so that a gradient in another's place has the right shape and only its values are wrong
                yield fields | {"grad": grad} | ({"value_width": fields["key_width"]} if grad == others else {})
    for length in (63, 64, 65):
        yield {**_SMALL, "lengths": (length,), "log_decay": decays[-1], "chunk_size": 64, "upstream": "state"} | {
            "final_state": True,
            "needs_grad": True,
        }
