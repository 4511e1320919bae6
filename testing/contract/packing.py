"""Checks of packing: packed documents (varlen, `cu_seqlens`) are independent sequences."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ...mixers.base.state import concatenate, map_state, select
from ...ops.runtime.packing import Documents
from ..check import NOT_PACKED, check, differentiable, packing
from ..gradients import strided, with_gradient_layout
from ..mixer.case import USES, Draw
from ..mixer.trial import SegmentCall, Trial

LISTS = ((130,), (0, 1, 0), (0, 0, 3, 0, 0, 5, 0), (0, 1, 2, 1) * 10, (70, 0, 65))
"""Lengths of the documents of the fixed cases: a long one; one token between empty ones; empty ones first, last and
adjacent; more than 32 documents; two long ones with an empty one between them."""

DOCUMENTS = Draw(pieces=(2, 4), tokens=(0, 6), long=12, many=8, lists=LISTS, batch_size=(1, 1))


@check(
    packing,
    use="packed text: documents leak into each other, or start from a wrong state",
    remedy=NOT_PACKED,
    share=0.07,
    draw=DOCUMENTS,
)
def documents_are_sequences(trial: Trial) -> None:
    """Packed documents, also empty ones, give the same as each alone: outputs, final states, and the outputs of later
    tokens."""
    blank = trial.case.length > 1 and trial.case.seed % 3 == 2 - (trial.case.start == "none")  # some fixed cases too
    x, state = trial.tokens(blank=blank), states_of_documents(trial)
    following = trial.tokens(len(trial.case.lengths), 2)
    # flash-attention takes int32 boundaries, torch makes int64
    boundaries = trial.boundaries(torch.int32 if trial.case.seed % 2 else torch.int64)
    assert boundaries is not None  # this check needs packing, and draws one row
    # other boundaries of as many documents and tokens: they must have no influence on the next call
    others = torch.cat((boundaries[:1], boundaries.diff().flip(0).cumsum(0))).to(boundaries.dtype)
    refilled_in = trial.paradigms[trial.case.seed // 4 % len(trial.paradigms)]
    # another check compares paradigms, so here one paradigm is enough for the documents alone
    groups = mix_each_alone(trial, trial.mix, x, state)
    following_alone = [trial.mix(following[trial.index(*rows)], after)[0] for rows, _, after in groups]
    for paradigm in trial.paradigms:
        buffer = others.clone()  # one tensor, which is filled again, as by a data loader
        if paradigm == refilled_in:
            trial.mix(x, state, cu_seqlens=buffer, paradigm=paradigm)
        _refill(buffer, boundaries, trial.case.seed)
        y, states = trial.mix(x, state, cu_seqlens=buffer, paradigm=paradigm)
        if paradigm == refilled_in:
            stateless, _ = trial.mix(x, state, cu_seqlens=boundaries, paradigm=paradigm, return_state=False)
            trial.compare(f"{paradigm}, packed, return_state=False", (stateless, None), (y, None))
            with _boundaries_on_the_device_alone():
                on_device = trial.mix(x, state, cu_seqlens=boundaries, paradigm=paradigm)
            trial.compare(f"{paradigm}, packed, boundaries on the device alone", on_device, (y, states))
        z, _ = trial.mix(following, states)
        what = f"{paradigm}, documents of {describe_lengths(trial)} tokens packed against each alone"
        with trial.differences(what) as differences:
            for (rows, part, after), expected in zip(groups, following_alone, strict=True):
                if part is not None:
                    packed_part = unpack_documents(y, trial.case.lengths, rows)
                    differences.tensor(f"document {rows[0]}'s output", packed_part, part, "NTD")
                # a growing state may hold a document's tokens in more room than the document alone needs
                index = trial.index(*rows)
                if trial.mixer.traits.state == "constant":
                    differences.state(f"document {rows[0]}'s final state", select(states, index), after)
                differences.tensor(f"document {rows[0]}'s output of two tokens later", z[index], expected, "NTD")


@contextmanager
def _boundaries_on_the_device_alone() -> Iterator[None]:
    """Keep the ops from reading boundaries as Python numbers, as on a GPU or in a compiled graph."""
    make_documents = Documents.of

    def without_numbers(*args: Any, **options: Any) -> Documents | None:
        documents = make_documents(*args, **options)
        return None if documents is None else documents._replace(boundaries=None)

    with patch.object(Documents, "of", without_numbers):
        yield


@check(
    differentiable,
    packing,
    use="training on packed text: gradients leak between documents",
    remedy=NOT_PACKED,
    share=0.04,
    draw=Draw(pieces=(2, 4), tokens=(0, 6), long=12, many=12, lists=LISTS[1:2], batch_size=(1, 1), uses=USES),
)
def gradients_of_documents_are_those_of_sequences(trial: Trial) -> None:
    """Packed documents have the gradients of each document alone, also with respect to their states, in every way of
    training. Upstream gradients may be non-contiguous."""
    x, state, lengths = trial.tokens(), states_of_documents(trial), trial.case.lengths
    boundaries = trial.boundaries()
    assert boundaries is not None
    boundaries = torch.stack((boundaries, 0 * boundaries), dim=1)[:, 0]  # strided, like a column of a table

    def one_by_one(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        groups = mix_each_alone(trial, trial.call(), x, state)
        return pack_outputs(groups, lengths), stack_states(groups) if trial.mixer.traits.state == "constant" else None

    expected = trial.differentiate(one_by_one, x, state)
    for paradigm in trial.paradigms:

        def packed(x, state, paradigm=paradigm):
            y, states = trial.used(paradigm, cu_seqlens=boundaries)(x, state)
            return with_gradient_layout(y, strided) if trial.case.seed % 2 else y, states

        actual = trial.differentiate(trial.without_growing_state(packed), x, state, used=True)
        what = f"{paradigm}, {trial.use}, documents of {describe_lengths(trial)} tokens packed against each alone"
        trial.compare(what, actual, expected)


def describe_lengths(trial: Trial) -> str:
    """Return the lengths of the documents as text, cut after eight."""
    lengths = trial.case.lengths
    return ", ".join(map(str, lengths[:8])) + (f" and {len(lengths) - 8} more" if len(lengths) > 8 else "")


def states_of_documents(trial: Trial) -> Any:
    """Return a state with one row per document; non-contiguous in every other case."""
    state = trial.state(len(trial.case.lengths))
    if state is None or trial.case.seed % 2:
        return state
    return map_state(lambda leaf: torch.stack((leaf, leaf), dim=1)[:, 0], state)


Group = tuple[list[int], Tensor | None, Any]
"""Documents of equal length: their indices, their outputs [N t D] (None if they are empty) and their final states."""


def mix_each_alone(trial: Trial, call: SegmentCall, x: Tensor, state: Any, **options: Any) -> list[Group]:
    """Process documents without packing; documents of equal length are the rows of a batch.

    Args:
        trial: the case, whose lengths are those of the documents.
        call: the call that processes a batch.
        x: the packed row of tokens [1 T D].
        state: state with one row per document; None for the initial state.
        options: further arguments of `call`.
    """
    lengths, groups = trial.case.lengths, []
    initial = trial.initial_state(len(lengths)) if state is None else state
    for length in dict.fromkeys(lengths):
        rows = [n for n, other in enumerate(lengths) if other == length]
        before = select(initial, trial.index(*rows))
        y, after = call(unpack_documents(x, lengths, rows), before, **options) if length else (None, before)
        groups.append((rows, y, after))
    return groups


def unpack_documents(x: Tensor, lengths: tuple[int, ...], rows: list[int]) -> Tensor:
    """Return documents of equal length as a batch: [1 T D] -> [N t D]."""
    parts = x[0].split(lengths)
    return torch.stack([parts[row] for row in rows])


def pack_outputs(groups: list[Group], lengths: tuple[int, ...]) -> Tensor:
    """Return the outputs of all documents as one packed row [1 T D]."""
    parts = {row: y for rows, ys, _ in groups if ys is not None for row, y in zip(rows, ys, strict=True)}
    return torch.cat([parts[row] for row in range(len(lengths)) if row in parts])[None]


def stack_states(groups: list[Group]) -> Any:
    """Return the final states of all documents as one state, a row per document."""
    rows = [row for group, _, _ in groups for row in group]
    return select(concatenate([after for _, _, after in groups]), torch.tensor(rows).argsort())


def _refill(buffer: Tensor, boundaries: Tensor, seed: int) -> None:
    """Write boundaries into a tensor: with torch or, for half of the seeds, without autograd's version counter.

    A data loader that fills the memory through numpy does not increase the counter either.
    """
    (buffer if seed % 4 < 2 else buffer.data).copy_(boundaries)
