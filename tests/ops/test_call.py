"""The one value that describes a call: immutable, made once, and what is derived of boundaries is derived once."""

import re
from itertools import accumulate
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from seqmix.mixers import MIXERS, Call, Paradigm
from seqmix.ops.context_parallel import ContextParallel
from seqmix.ops.packing import Documents
from seqmix.registry import SeqmixError

LENGTHS = [0, 3, 0, 1, 5]
BOUNDARIES = torch.tensor([0, *accumulate(LENGTHS)])
LENGTH = sum(LENGTHS)
BUILT_IN = [kind for kind in MIXERS.kinds() if MIXERS.origin(kind).startswith("seqmix.")]


class State(NamedTuple):
    memory: Tensor
    position: Tensor


STATE = State(torch.zeros(5, 2), torch.tensor([0, 7, 1, 2, 9]))


def equal(actual, expected):
    assert_close(actual, torch.tensor(expected), rtol=0, atol=0)


def test_a_call_is_made_in_the_words_of_fla():
    call = Call.of("recurrent", LENGTH, STATE, True, BOUNDARIES, chunk_size=7, backend="triton")
    assert (call.paradigm, call.state, call.return_state) == (Paradigm.RECURRENT, STATE, True)
    assert (call.chunk_size, call.backend, call.cp_group) == (7, "triton", None)
    assert call.cu_seqlens is BOUNDARIES
    assert Call.of(Paradigm.PARALLEL, 3) == Call(Paradigm.PARALLEL)
    assert Call(Paradigm.PARALLEL).cu_seqlens is None
    with pytest.raises(SeqmixError, match=r"'paralel'.*parallel"):
        Call.of("paralel", 3)


@pytest.mark.parametrize("boundaries", [[0, 5], [1, 6], [0, 4, 2, 6], [0, 7], [0], []], ids=str)
def test_boundaries_that_do_not_rise_to_the_length_are_refused(boundaries):
    with pytest.raises(SeqmixError, match=rf"cu_seqlens .* 6 .*{re.escape(str(boundaries))}"):
        Call.of("parallel", 6, cu_seqlens=torch.tensor(boundaries, dtype=torch.int64))


def test_to_enter_is_to_read_one_leaf():
    call = Call.of("parallel", LENGTH, STATE, True, BOUNDARIES)
    entered = call.enter("memory")
    assert entered.state is STATE.memory
    assert entered._replace(state=None) == call._replace(state=None)
    assert call.state is STATE
    assert entered.documents is call.documents
    nothing = call._replace(state=None)
    assert nothing.enter("memory") is nothing
    with pytest.raises(AttributeError, match="memry"):
        call.enter("memry")


def test_documents_are_what_their_boundaries_say():
    documents = Documents.of(BOUNDARIES, LENGTH)
    assert Documents.of(None, LENGTH) is None
    assert documents.cu_seqlens is BOUNDARIES
    assert documents.boundaries == (0, 0, 3, 3, 4, 9)
    equal(documents.of_token, [1, 1, 1, 3, 4, 4, 4, 4, 4])
    # one process's segment: its own tokens, and boundaries of the whole row
    segment = Documents.of(BOUNDARIES, 3, 3, LENGTH)
    equal(segment.of_token, [3, 4, 4])
    assert segment.boundaries == documents.boundaries
    with pytest.raises(SeqmixError, match=r"cu_seqlens .* 9 "):
        Documents.of(BOUNDARIES[:-1], 3, 3, LENGTH)


@pytest.mark.parametrize("documents", [None, Documents.of(BOUNDARIES, LENGTH)], ids=["batch", "packed"])
@pytest.mark.parametrize("cp_group", [None, ContextParallel("no group is asked", rank=1, size=3)], ids=["alone", "cp"])
def test_positions_and_rows_are_those_of_rows_or_documents(documents, cp_group):
    call = Call(Paradigm.PARALLEL, documents=documents, cp_group=cp_group)
    batch = 2 if documents is None else 1
    x, start, size = torch.zeros(batch, LENGTH, 4), *((0, 1) if cp_group is None else (9, 3))
    assert call.rows(batch) == (2 if documents is None else 5)
    if documents is None:
        equal(call.positions(x, None), [list(range(start, start + 9))])
        equal(call.positions(x, torch.tensor([0, 4])), [[start + t + n for t in range(9)] for n in (0, 4)])
        equal(call.advance(x, None), [9 * size] * 2)
        equal(call.advance(x, torch.tensor([0, 4])), [9 * size, 9 * size + 4])
        return
    if cp_group is None:
        equal(call.positions(x, None), [[0, 1, 2, 0, 0, 1, 2, 3, 4]])
        equal(call.positions(x, STATE.position), [[7, 8, 9, 2, 9, 10, 11, 12, 13]])
    equal(call.advance(x, None), LENGTHS)
    equal(call.advance(x, STATE.position), [0, 10, 1, 3, 14])


@pytest.mark.parametrize("kind", BUILT_IN)
def test_the_boundaries_of_a_packed_row_are_read_once_a_call(kind, monkeypatch):
    mixer = MIXERS.resolve(kind).example().build(12, layer_idx=0, n_layers=1)
    listed, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: listed.append(tensor) or tolist(tensor))
    x = torch.randn(1, LENGTH, 12, requires_grad=True)
    for paradigm in mixer.traits.paradigms:
        listed.clear()
        y, _ = mixer(x, paradigm=paradigm, cu_seqlens=BOUNDARIES, return_state=True)
        y.sum().backward()
        assert len(listed) == 1, paradigm
        assert listed[0] is BOUNDARIES
