"""`Call`, the value that describes a call of an op: construction, validation and reading of boundaries."""

import re
from itertools import accumulate
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from seqmix.mixers import MIXERS, Call, Paradigm
from seqmix.ops.attention import softmax_attention
from seqmix.ops.cell import slstm
from seqmix.ops.convolution import long_convolution, short_convolution
from seqmix.ops.decay import decay
from seqmix.ops.decay.api import decay_reading_values
from seqmix.ops.delta import delta, delta_product
from seqmix.ops.dplr import dplr
from seqmix.ops.scan import diagonal_scan, log_scan, scan
from seqmix.registry import SeqmixError

LENGTHS = [0, 3, 0, 1, 5]
BOUNDARIES = torch.tensor([0, *accumulate(LENGTHS)])
LENGTH = sum(LENGTHS)
BUILT_IN = sorted(MIXERS.built_in())


class State(NamedTuple):
    memory: Tensor
    position: Tensor


STATE = State(torch.zeros(5, 2), torch.tensor([0, 7, 1, 2, 9]))


def test_deprecated_name_of_resolve_warns():
    call = Call(Paradigm.PARALLEL)
    with pytest.warns(DeprecationWarning, match=r"Call\.given is now Call\.resolve"):
        assert Call.given(call, 3, {}, op="decay", paradigm=Paradigm.CHUNKWISE) is call
    assert Call.resolve(None, 3, {}, op="decay", paradigm=Paradigm.CHUNKWISE) == Call(Paradigm.CHUNKWISE)


def test_call_of_accepts_fla_argument_names():
    call = Call.of("recurrent", LENGTH, STATE, True, BOUNDARIES, chunk_size=7, backend="triton")
    assert (call.paradigm, call.state, call.return_state) == (Paradigm.RECURRENT, STATE, True)
    assert (call.chunk_size, call.backend, call.cp_group) == (7, "triton", None)
    assert call.cu_seqlens is BOUNDARIES
    assert Call.of(Paradigm.PARALLEL, 3) == Call(Paradigm.PARALLEL)
    assert Call(Paradigm.PARALLEL).cu_seqlens is None
    with pytest.raises(SeqmixError, match=r"'paralel'.*parallel"):
        Call.of("paralel", 3)


@pytest.mark.parametrize("boundaries", [[0, 5], [1, 6], [0, 4, 2, 6], [0, 7], [0], []], ids=str)
def test_invalid_boundaries_raise(boundaries):
    with pytest.raises(SeqmixError, match=rf"cu_seqlens .* 6, .*{re.escape(str(boundaries))}"):
        Call.of("parallel", 6, cu_seqlens=torch.tensor(boundaries, dtype=torch.int64))


def test_enter_replaces_the_state_with_one_of_its_leaves():
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
def test_packed_boundaries_are_read_once_per_call(kind, monkeypatch):
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


def _arguments(*widths):
    return [torch.zeros(1, 3, 2, width) for width in widths]


BACKENDS = {
    decay: (_arguments(4, 4, 4), "auto, fla, native, reference, triton, triton_tf32x3"),
    delta: ([*_arguments(4, 4, 4), torch.zeros(1, 3, 2)], "auto, native, reference, triton"),
    scan: ([torch.zeros(1, 3, 2)] * 2, "auto, native, reference"),
    slstm: ([torch.zeros(1, 3, 2, 16), torch.zeros(2, 4, 16)], "auto, native, reference"),
    short_convolution: ([torch.zeros(1, 3, 2), torch.zeros(2, 4)], "auto, native, reference"),
    softmax_attention: (_arguments(4, 4, 4), "auto, flex, sdpa, xformers"),
    long_convolution: ([torch.zeros(1, 3, 2), torch.zeros(2, 4)], "auto, reference"),
}


@pytest.mark.parametrize("op", BACKENDS, ids=lambda op: op.__name__)
def test_misspelt_backend_raises_and_lists_the_ops_backends(op):
    arguments, backends = BACKENDS[op]
    for backend in (name for name in backends.split(", ") if name not in ("fla", "xformers") and "triton" not in name):
        op(*arguments, backend=backend)
    with pytest.raises(SeqmixError, match=f"has no backend 'refrence'.*{backends}$"):
        op(*arguments, backend="refrence")
    if op is decay:
        with pytest.raises(SeqmixError, match=r"decay has no backend 'tritn'; did you mean \"triton\"\?"):
            op(*arguments, backend="tritn")
        with pytest.raises(SeqmixError, match="decay has no backend None"):
            op(*arguments, backend=None)


POSITIVE = {
    "decay": lambda a: decay(*_arguments(4, 4, 4), a[0, 0, :, 0]),
    "decay_reading_values": lambda a: decay_reading_values(*_arguments(4, 4, 4), a),
    "delta": lambda a: delta(*_arguments(4, 4, 4), torch.zeros(1, 3, 2), a[..., 0]),
    "delta_product": lambda a: delta_product(*_arguments(4, 4, 4), torch.zeros(1, 3, 2), a[..., 0]),
    "dplr": lambda a: dplr(*_arguments(4, 4, 4, 4), log_decay=a),
    "scan": lambda a: scan(torch.zeros_like(a), a),
    "log_scan": lambda a: log_scan(torch.zeros_like(a), a),
    "diagonal_scan": lambda a: diagonal_scan(torch.zeros(1, 3, 4), a[0, 0], a[0, 0], torch.zeros(2, 4, 2)),
}


@pytest.mark.parametrize("op", POSITIVE)
def test_positive_log_decay_raises_in_a_direct_call(op):
    run = POSITIVE[op]
    log_decay = torch.zeros(1, 3, 2, 4)
    log_decay[..., 1] = -torch.inf
    run(log_decay)
    log_decay[0, 0, 1, 0] = 0.9
    with pytest.raises(SeqmixError, match=r"log_decay .* <= 0, got up to 0\.9; pass decay\.log\(\)"):
        run(log_decay)


def test_log_decays_are_not_read_while_tracing(counter):
    log_decay = torch.ones(2)

    def run(log_decay):
        return decay(*_arguments(4, 4, 4), log_decay, backend="reference").output

    torch.compile(run, fullgraph=True, backend=counter)(log_decay)
    torch.func.vmap(run)(log_decay[None])
    with FakeTensorMode():
        run(torch.ones(2))
