"""Going back: the state before the last tokens of a segment that a mixer has already read."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...ops.runtime.paradigm import Paradigm
from .layer_call import LayerCall
from .state import concatenate, select
from .traits import ContractError


def kept_tokens(x: Tensor, tokens: int | Tensor, cu_seqlens: Tensor | None, kind: str) -> list[int]:
    """Return the number of tokens of each row (or packed document) that remain after going back.

    Raises:
        ContractError: `tokens` has not one number per row, or a number is outside 0 to the row's length.
    """
    lengths = [x.shape[1]] * x.shape[0] if cu_seqlens is None else cu_seqlens.diff().tolist()
    counts = [tokens] * len(lengths) if isinstance(tokens, int) else tokens.tolist()
    if not isinstance(counts, list) or len(counts) != len(lengths):
        raise ContractError(
            f"{kind}: rollback expects one number of tokens, or one for each of the {len(lengths)} rows, got {counts}"
        )
    for count, length in zip(counts, lengths, strict=True):
        if not 0 <= count <= length:
            raise ContractError(f"{kind}: rollback expects 0 to {length} tokens of a segment of {length}, got {count}")
    return [length - count for count, length in zip(counts, lengths, strict=True)]


def read_again(
    mixer: Any,
    x: Tensor,
    before: Any,
    kept: Sequence[int],
    paradigm: Paradigm,
    cu_seqlens: Tensor | None,
    values: Mapping[str, Tensor | None],
) -> Any:
    """Return the state after the first kept[n] tokens of each row n, which the mixer reads again from `before`.

    `values` has the values from outside by name. The other arguments are those of `SequenceMixer.rollback`.
    """
    if not any(kept):
        return mixer.init_state(len(kept)) if before is None else before

    def state_after(x: Tensor, before: Any, values: Mapping[str, Tensor], boundaries: Tensor | None = None) -> Any:
        first, token = values.get("first_values"), values.get("token_values")
        call = LayerCall(before, paradigm, boundaries, return_state=True, first_values=first, token_values=token)
        return mixer(x, call=call).state

    passed = {name: each for name, each in values.items() if each is not None}
    if cu_seqlens is None and len(set(kept)) == 1:  # one length for all rows: shapes do not depend on data
        return state_after(x[:, : kept[0]], before, {name: each[:, : kept[0]] for name, each in passed.items()})
    starts = [row * x.shape[1] for row in range(len(kept))] if cu_seqlens is None else cu_seqlens[:-1].tolist()
    index = torch.cat([torch.arange(start, start + count) for start, count in zip(starts, kept, strict=True)])
    index = index.to(x.device)
    x = x.flatten(0, 1)[index][None]
    passed = {name: each.flatten(0, 1)[index][None] for name, each in passed.items()}
    ends = list(accumulate(kept))
    if mixer.traits.packing:
        return state_after(x, before, passed, torch.tensor([0, *ends], device=x.device))
    states = []
    for row, (end, count) in enumerate(zip(ends, kept, strict=True)):
        tokens = slice(end - count, end)
        state = None if before is None else select(before, torch.tensor([row]))
        if count:
            state = state_after(x[:, tokens], state, {name: each[:, tokens] for name, each in passed.items()})
        states.append(mixer.init_state(1) if state is None else state)
    return concatenate(states)
