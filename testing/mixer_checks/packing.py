"""Packed documents (varlen, `cu_seqlens`) are independent sequences."""

from itertools import accumulate

import torch
from torch import Tensor

from ...mixers.state import concatenate, select
from ..check import check, packing
from ..mixer_case import Draw
from ..mixer_trial import Trial

DOCUMENTS = Draw(pieces=(1, 4), tokens=(0, 6), long=12, batch_size=(1, 1))


@check(packing, share=0.5, draw=DOCUMENTS)
def documents_are_sequences(trial: Trial) -> None:
    """Packed documents, empty ones too, give what each gives alone: output, final state, and what is read later."""
    lengths = trial.case.lengths
    x, state = trial.tokens(), trial.state(len(lengths))
    following = trial.tokens(len(lengths), 2)
    initial = trial.mixer.init_state(len(lengths)) if state is None else state
    # int32 is what flash-attention takes, int64 what torch makes
    boundaries = _boundaries(trial, torch.int32 if trial.case.seed % 2 else torch.int64)
    for paradigm in trial.paradigms:
        y, states = trial.mix(x, state, cu_seqlens=boundaries, paradigm=paradigm)
        z, _ = trial.mix(following, states)
        for n, document in enumerate(x.split(lengths, dim=1)):
            row = trial.index(n)
            alone, after = select(initial, row), select(states, row)
            start = sum(lengths[:n])
            with trial.differences(f"{paradigm}, document {n} of {len(lengths)} packed against it alone") as found:
                if lengths[n]:
                    expected, alone = trial.mix(document, alone, paradigm=paradigm)
                    found.tensor("the output", y[:, start : start + lengths[n]], expected, "BTD")
                # a growing state may hold a document's tokens in more room than it would need alone
                if trial.mixer.traits.state == "constant":
                    found.state("the final state", after, alone)
                found.tensor("the output of two tokens later", z[row], trial.mix(following[row], alone)[0], "BTD")


@check(packing, share=0.25, draw=DOCUMENTS)
def gradients_of_documents_are_those_of_sequences(trial: Trial) -> None:
    """Gradients of packed documents, of their states too, are those of each document alone."""
    lengths = trial.case.lengths
    x, state = trial.tokens(), trial.state(len(lengths))
    boundaries = _boundaries(trial, torch.int64)
    # a growing state may hold a document's tokens in more room than it would need alone
    keep_state = trial.mixer.traits.state == "constant"

    def one_by_one(x, state):
        outputs, states = [], []
        for n, document in enumerate(x.split(lengths, dim=1)):
            after = select(trial.mixer.init_state(len(lengths)) if state is None else state, trial.index(n))
            if lengths[n]:
                y, after = trial.call()(document, after)
                outputs.append(y)
            states.append(after)
        return torch.cat(outputs, dim=1), concatenate(states) if keep_state else None

    expected = trial.differentiate(one_by_one, x, state)
    for paradigm in trial.paradigms:

        def packed(x, state, paradigm=paradigm):
            y, states = trial.call(paradigm, cu_seqlens=boundaries)(x, state)
            return y, states if keep_state else None

        actual = trial.differentiate(packed, x, state)
        trial.compare(f"{paradigm}, packed documents against each alone", actual, expected)


def _boundaries(trial: Trial, dtype: torch.dtype) -> Tensor:
    return torch.tensor([0, *accumulate(trial.case.lengths)], dtype=dtype, device=trial.subject.device)
