"""The one value that describes a call: made once, and boundaries are read once."""

import re
from itertools import accumulate
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from seqmix.mixers import MIXERS, Call, Paradigm
from seqmix.registry import SeqmixError

LENGTHS = [0, 3, 0, 1, 5]
BOUNDARIES = torch.tensor([0, *accumulate(LENGTHS)])
LENGTH = sum(LENGTHS)
BUILT_IN = sorted(MIXERS.built_in())


class State(NamedTuple):
    memory: Tensor
    position: Tensor


STATE = State(torch.zeros(5, 2), torch.tensor([0, 7, 1, 2, 9]))


def test_the_former_name_of_resolve_warns():
    call = Call(Paradigm.PARALLEL)
    with pytest.warns(DeprecationWarning, match=r"Call\.given is now Call\.resolve"):
        assert Call.given(call, 3, {}, paradigm=Paradigm.CHUNKWISE) is call
    assert Call.resolve(None, 3, {}, paradigm=Paradigm.CHUNKWISE) == Call(Paradigm.CHUNKWISE)


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
    with pytest.raises(SeqmixError, match=rf"cu_seqlens .* 6, .*{re.escape(str(boundaries))}"):
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
        # scans read tensors of places too, which they have made of the boundaries on the host
        assert len([tensor for tensor in listed if tensor is BOUNDARIES]) == 1, paradigm
