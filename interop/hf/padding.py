"""Padded batches: each row is mixed without its padding, as if it were alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...blocks import Block
from ...mixers import SequenceMixer
from ...mixers.base.state import concatenate, select
from ...registry import SeqmixError


class RowLayout(NamedTuple):
    """Layout of the rows of a segment [B T]: padding and packed documents."""

    mask: Bool[Tensor, "B T"] | None = None
    """True for real tokens, False for padding; None without padding."""
    cu_seqlens: Int[Tensor, "N+1"] | None = None
    """Boundaries of N documents packed in one row: document n is tokens cu_seqlens[n] to cu_seqlens[n+1] - 1; None if
    no documents are packed."""


def layout_of(
    shape: tuple[int, int], attention_mask: Tensor | None, options: Mapping[str, Any], *, continues_cache: bool
) -> RowLayout:
    """Return the layout of the rows of a segment, from the arguments of a Hugging Face model.

    Args:
        shape: B and T.
        attention_mask: mask of all tokens so far, [B S]; the segment is the last T tokens.
        options: `cu_seq_lens_q`, or `position_ids` [B T], which count from 0 in every packed document.
        continues_cache: True if the segment continues cached states, which count positions themselves.

    Raises:
        SeqmixError: the mask does not have one entry per token, or documents are packed in several rows.
    """
    count, length = shape
    if attention_mask is not None:
        if attention_mask.dim() != 2 or len(attention_mask) != count or attention_mask.shape[1] < length:
            mask_shape = list(attention_mask.shape)
            raise SeqmixError(
                f"attention_mask must have one entry per token, {[count, length]}, got shape {mask_shape}"
            )
        mask = attention_mask[:, -length:].bool()
        if not mask.all():
            return RowLayout(mask)
    positions = options.get("position_ids")
    if (boundaries := options.get("cu_seq_lens_q")) is not None or positions is None or continues_cache:
        return RowLayout(None, boundaries)
    starts = positions == 0
    if not starts[:, 1:].any():
        return RowLayout()
    if count > 1:
        raise SeqmixError(
            f"packed documents must be in one row, got position_ids that restart at 0 in a batch of {count} rows"
        )
    return RowLayout(None, F.pad(starts[0].nonzero()[:, 0], (0, 1), value=length))


def mix_rows(
    mix: Callable[..., Any],
    x: Float[Tensor, "B T D"],
    state: Any,
    rows: RowLayout,
    mixers: Sequence[SequenceMixer[Any] | Block],
) -> tuple[Float[Tensor, "B T D"], Any]:
    """Mix a batch whose rows may have padding anywhere, which is skipped.

    If all mixers declare packing, the rows are packed documents of one call; otherwise there is one call per row.

    Args:
        mix: a function of a segment without padding, a state and `cu_seqlens`, which returns the output and the state
            after the segment.
        x: the batch.
        state: the state of B rows before the batch; None if no tokens came before.
        rows: padding and packed documents.
        mixers: the mixers, or the blocks that contain them.

    Returns:
        The output, 0 at padding, and the state of B rows, which padding does not change.
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
    """Return a batch [B T D] with the outputs of the N real tokens at their places, and 0 at padding."""
    spread = y.new_zeros(*mask.shape, y.shape[-1])
    spread[mask] = y
    return spread
