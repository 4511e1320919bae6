"""Padded batches: rows of a batch without their padding, each mixed as if it were alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..mixers import SequenceMixer
from ..mixers.state import concatenate, select
from ..registry import SeqmixError


class Rows(NamedTuple):
    """What the rows of a segment [B T] are made of."""

    mask: Bool[Tensor, "B T"] | None = None
    """Which tokens are real; None where all are."""
    cu_seqlens: Int[Tensor, "N+1"] | None = None
    """The boundaries of documents that are packed in one row."""


def rows_of(shape: tuple[int, int], attention_mask: Tensor | None, options: Mapping[str, Any], *, cached: bool) -> Rows:
    """What Hugging Face says of the rows of a segment.

    Args:
        shape: B and T.
        attention_mask: [B S], of all tokens so far: the segment is the last T.
        options: `cu_seq_lens_q`, or `position_ids` [B T], which count from 0 in every packed document.
        cached: whether the segment continues states, which have their own positions.

    Raises:
        SeqmixError: the mask has not one entry per token, or documents are packed in several rows.
    """
    count, length = shape
    if attention_mask is not None:
        if attention_mask.dim() != 2 or len(attention_mask) != count or attention_mask.shape[1] < length:
            given = list(attention_mask.shape)
            raise SeqmixError(f"an attention mask has one entry per token, {[count, length]}, and its shape is {given}")
        mask = attention_mask[:, -length:].bool()
        if not mask.all():
            return Rows(mask)
    positions = options.get("position_ids")
    if (boundaries := options.get("cu_seq_lens_q")) is not None or positions is None or cached:
        return Rows(None, boundaries)
    starts = positions == 0
    if not starts[:, 1:].any():
        return Rows()
    if count > 1:
        raise SeqmixError("packed documents come in one row, and positions start again at 0 in a batch of several")
    return Rows(None, F.pad(starts[0].nonzero()[:, 0], (0, 1), value=length))


def mix_rows(
    mix: Callable[..., Any], x: Float[Tensor, "B T D"], state: Any, rows: Rows, mixers: Sequence[SequenceMixer[Any]]
) -> tuple[Float[Tensor, "B T D"], Any]:
    """Mix a batch whose rows may have padding anywhere: the real tokens as packed documents, or row by row.

    `mix` takes a segment without padding, a state and `cu_seqlens`, and returns the output and the state after it.

    Returns:
        The output, 0 at padding, and the state of B rows: padding leaves it as it was.
    """
    mask = rows.mask
    if mask is None:
        return mix(x, state, rows.cu_seqlens)
    if all(mixer.traits.packing for mixer in mixers):
        y, after = mix(x[mask][None], state, F.pad(mask.sum(1).cumsum(0), (1, 0)))
        return _spread(y[0], mask), after
    parts = []
    states = []
    for row, real in enumerate(mask):
        before = None if state is None else select(state, torch.tensor([row]))
        if real.any():
            y, before = mix(x[row][real][None], before, None)
            parts.append(y[0])
        states.append(before)
    return _spread(torch.cat(parts), mask), None if state is None else concatenate(states)


def _spread(y: Float[Tensor, "N D"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
    """The outputs of real tokens at their places."""
    spread = y.new_zeros(*mask.shape, y.shape[-1])
    spread[mask] = y
    return spread
