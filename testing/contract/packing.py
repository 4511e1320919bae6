"""Packed documents (varlen, `cu_seqlens`) are independent sequences."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ...mixers.state import concatenate, map_state, select
from ...ops.runtime.packing import Documents
from ..check import NOT_PACKED, check, differentiable, packing
from ..gradients import strided, with_gradient_layout
from ..mixer.case import USES, Draw
from ..mixer.trial import SegmentCall, Trial

LISTS = ((130,), (0, 1, 0), (0, 0, 3, 0, 0, 5, 0), (0, 1, 2, 1) * 10, (70, 0, 65))
"""Documents that are not left to chance: a long one; one token between empty ones; empty ones first, last and
adjacent; more than 32; long ones."""

DOCUMENTS = Draw(pieces=(2, 4), tokens=(0, 6), long=12, many=8, lists=LISTS, batch_size=(1, 1))


@check(
    packing,
    use="packed text: documents leak into each other, or start from a wrong state",
    remedy=NOT_PACKED,
    share=0.12,
    draw=DOCUMENTS,
)
def documents_are_sequences(trial: Trial) -> None:
    """Packed documents, empty ones too, give what each gives alone: output, final state, and what is read later."""
    blank = trial.case.length > 1 and trial.case.seed % 3 == 2 - (trial.case.start == "none")  # some fixed ones too
    x, state = trial.tokens(blank=blank), states_of_documents(trial)
    following = trial.tokens(len(trial.case.lengths), 2)
    # int32 is what flash-attention takes, int64 what torch makes
    boundaries = trial.boundaries(torch.int32 if trial.case.seed % 2 else torch.int64)
    assert boundaries is not None  # this check needs packing, and draws one row
    # as many documents and tokens as before, with other boundaries: nothing may be left of those
    others = torch.cat((boundaries[:1], boundaries.diff().flip(0).cumsum(0))).to(boundaries.dtype)
    refilled = trial.paradigms[trial.case.seed // 4 % len(trial.paradigms)]
    # that paradigms give the same is a check of its own: one gives what each document is alone
    groups = list(alone(trial, trial.mix, x, state))
    later = [trial.mix(following[trial.index(*rows)], after)[0] for rows, _, after in groups]
    for paradigm in trial.paradigms:
        reused = others.clone()  # one tensor, which a loader fills again
        if paradigm == refilled:
            trial.mix(x, state, cu_seqlens=reused, paradigm=paradigm)
        y, states = trial.mix(x, state, cu_seqlens=_refilled(reused, boundaries, trial.case.seed), paradigm=paradigm)
        if paradigm == refilled:
            unwanted, _ = trial.mix(x, state, cu_seqlens=boundaries, paradigm=paradigm, return_state=False)
            trial.compare(f"{paradigm}, packed, no final states wanted", (unwanted, None), (y, None))
            with _not_as_numbers():
                unread = trial.mix(x, state, cu_seqlens=boundaries, paradigm=paradigm)
            trial.compare(f"{paradigm}, packed, boundaries that are on the device alone", unread, (y, states))
        z, _ = trial.mix(following, states)
        what = f"{paradigm}, documents of {described(trial)} tokens packed against each alone"
        with trial.differences(what) as differences:
            for (rows, part, after), two in zip(groups, later, strict=True):
                if part is not None:
                    differences.tensor(
                        f"document {rows[0]}'s output", documents(y, trial.case.lengths, rows), part, "NTD"
                    )
                # a growing state may hold a document's tokens in more room than it would need alone
                index = trial.index(*rows)
                if trial.mixer.traits.state == "constant":
                    differences.state(f"document {rows[0]}'s final state", select(states, index), after)
                differences.tensor(f"document {rows[0]}'s output of two tokens later", z[index], two, "NTD")


@contextmanager
def _not_as_numbers() -> Iterator[None]:
    """Boundaries are not read as numbers, as on a GPU and by a compiler."""
    of = Documents.of

    def unread(*args: Any, **options: Any) -> Documents | None:
        documents = of(*args, **options)
        return None if documents is None else documents._replace(boundaries=None)

    with patch.object(Documents, "of", unread):
        yield


@check(
    differentiable,
    packing,
    use="training on packed text: gradients leak between documents",
    remedy=NOT_PACKED,
    share=0.07,
    draw=Draw(pieces=(2, 4), tokens=(0, 6), long=12, many=12, lists=LISTS[1:2], batch_size=(1, 1), uses=USES),
)
def gradients_of_documents_are_those_of_sequences(trial: Trial) -> None:
    """Gradients of packed documents, of their states too, are those of each document alone, in every way of training;
    gradients from above need not be contiguous."""
    x, state, lengths = trial.tokens(), states_of_documents(trial), trial.case.lengths
    boundaries = trial.boundaries()
    assert boundaries is not None
    boundaries = torch.stack((boundaries, 0 * boundaries), dim=1)[:, 0]  # as a column of a table is

    def one_by_one(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        groups = list(alone(trial, trial.call(), x, state))
        return together(groups, lengths), in_order(groups) if trial.mixer.traits.state == "constant" else None

    expected = trial.differentiate(one_by_one, x, state)
    for paradigm in trial.paradigms:

        def packed(x, state, paradigm=paradigm):
            y, states = trial.used(paradigm, cu_seqlens=boundaries)(x, state)
            return with_gradient_layout(y, strided) if trial.case.seed % 2 else y, states

        actual = trial.differentiate(trial.kept(packed), x, state, used=True)
        what = f"{paradigm}, {trial.use}, documents of {described(trial)} tokens packed against each alone"
        trial.compare(what, actual, expected)


def described(trial: Trial) -> str:
    """The documents' lengths."""
    lengths = trial.case.lengths
    return ", ".join(map(str, lengths[:8])) + (f" and {len(lengths) - 8} more" if len(lengths) > 8 else "")


def states_of_documents(trial: Trial) -> Any:
    """A state for every document; every other case as rows of a larger batch are, which are not contiguous."""
    state = trial.state(len(trial.case.lengths))
    if state is None or trial.case.seed % 2:
        return state
    return map_state(lambda leaf: torch.stack((leaf, leaf), dim=1)[:, 0], state)


Group = tuple[list[int], Tensor | None, Any]
"""Documents of one length: their numbers, their outputs [N T D] (None of empty ones) and their final states."""


def alone(trial: Trial, call: SegmentCall, x: Tensor, state: Any, **options: Any) -> list[Group]:
    """What each document gives that is not packed; those of one length are the rows of a batch."""
    lengths, groups = trial.case.lengths, []
    initial = trial.initial_state(len(lengths)) if state is None else state
    for length in dict.fromkeys(lengths):
        rows = [n for n, other in enumerate(lengths) if other == length]
        before = select(initial, trial.index(*rows))
        mixed = call(documents(x, lengths, rows), before, **options) if length else (None, before)
        groups.append((rows, *mixed))
    return groups


def documents(x: Tensor, lengths: tuple[int, ...], rows: list[int]) -> Tensor:
    """Documents of one length of a packed row, as a batch: [1 T D] -> [N T D]."""
    parts = x[0].split(lengths)
    return torch.stack([parts[row] for row in rows])


def together(groups: list[Group], lengths: tuple[int, ...]) -> Tensor:
    """The packed row of outputs: [1 T D]."""
    parts = {row: y for rows, ys, _ in groups if ys is not None for row, y in zip(rows, ys, strict=True)}
    return torch.cat([parts[row] for row in range(len(lengths)) if row in parts])[None]


def in_order(groups: list[Group]) -> Any:
    """The final states, one row per document."""
    rows = [row for group, _, _ in groups for row in group]
    return select(concatenate([after for _, _, after in groups]), torch.tensor(rows).argsort())


def _refilled(buffer: Tensor, boundaries: Tensor, seed: int) -> Tensor:
    """Filled again by torch, or by what torch does not see, as a loader's numpy is."""
    (buffer if seed % 4 < 2 else buffer.data).copy_(boundaries)
    return buffer
