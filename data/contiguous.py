"""Where the sequences of a step begin if each goes on where that of the step before ended.

The text is cut into as many lanes as a batch has rows, and every row reads its lane from start to end, a window a step.
At the end of the lanes they are cut anew, from another first token, and read again.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from ..registry import SeqmixError


class Windows(NamedTuple):
    """The sequences of one step."""

    starts: Int64[np.ndarray, " B"]
    """The first token of each."""
    first: bool
    """Whether they begin lanes, so that nothing is before them."""


def contiguous_windows(n_tokens: int, length: int, batch_size: int, *, seed: int, step: int) -> Windows:
    """The sequences of one step, a function of (seed, step) alone.

    Args:
        n_tokens: tokens of the text.
        length: tokens of a sequence, each of which needs one more for its last target.
        batch_size: rows of a batch.
        seed: the first token of the lanes is a function of it.
        step: the step, from 0.

    Raises:
        SeqmixError: the text is too short for a sequence a row.
    """
    per_lane = (n_tokens - length) // (batch_size * length)
    if per_lane < 1:
        raise SeqmixError(
            f"training.carry_state reads {batch_size} lanes of the training text side by side, which takes "
            f"{(batch_size + 1) * length} tokens, and it has {n_tokens}: lower training.batch_size or "
            "data.sequence_length, or give more text"
        )
    reading, window = divmod(step, per_lane)
    lane = per_lane * length
    # what the lanes leave over is skipped at the start or at the end
    offset = np.random.default_rng([seed, reading]).integers(0, n_tokens - batch_size * lane)
    return Windows(offset + np.arange(batch_size) * lane + window * length, window == 0)
