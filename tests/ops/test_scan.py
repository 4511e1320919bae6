"""Scans against their recurrences, computed token by token and document by document in float64."""

import itertools
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from seqmix.ops.runtime.paradigm import Paradigm
from seqmix.ops.scan import (
    SCAN_PARADIGMS,
    blocks,
    diagonal_scan,
    log_scan,
    scan,
    selective_scan,
)
from seqmix.registry import SeqmixError

C, K = 5, 3
NOTHING = {log_scan: -torch.inf}
every_paradigm = pytest.mark.parametrize("paradigm", sorted(SCAN_PARADIGMS))
every_op = pytest.mark.parametrize("op", [scan, selective_scan, log_scan, diagonal_scan])
every_layout = pytest.mark.parametrize(
    ("lengths", "packed"),
    [([1, 1], False), ([7, 7], False), ([30], False), ([5], True), ([0, 9, 0, 1, 1, 12, 8, 0], True)],
    ids=str,
)
exactly = partial(assert_close, rtol=1e-9, atol=1e-9)
randn = partial(torch.randn, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(blocks, "ELEMENTS", 2 * C * K * 8)  # several groups of several blocks


def tensors(op, lengths, packed, *, reset=0.1, strength=2.0, dtype=torch.float64):
    """The op's tensors, the initial state last, which need gradients, and boundaries."""
    batch, length = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    x, step = randn(batch, length, C), strength * torch.rand(batch, length, C, dtype=torch.float64)
    boundaries = torch.tensor([0, *itertools.accumulate(lengths)]) if packed else None
    if op is diagonal_scan:
        log_decay, angle = -strength * torch.rand(K, C, dtype=torch.float64), 3 * randn(K, C)
        given = [x, log_decay, angle, randn(K, C, 2), randn(len(lengths), K, C, 2)]
    elif op is not selective_scan:
        log_decay = (-step).masked_fill(torch.rand_like(step) < reset, -torch.inf)
        given = [x, log_decay, randn(len(lengths), C)]
    else:
        rate = -torch.rand(K, C, dtype=torch.float64).exp()
        given = [x, step, rate, randn(batch, length, K), randn(batch, length, K), randn(len(lengths), K, C)]
    return [tensor.to(dtype).requires_grad_() for tensor in given], boundaries


def define(op, given, h):
    """For one sequence, [T *]: outputs, and the state after it."""
    outputs = []
    for t in range(len(given[0])):
        if op is diagonal_scan:
            x, log_decay, angle, weight = given
            turn = torch.polar(log_decay.exp(), angle)
            h = torch.view_as_real(turn * torch.view_as_complex(h.contiguous()) + x[t])
            outputs.append((weight[..., 0] * h[..., 0] - weight[..., 1] * h[..., 1]).sum(0))
        elif op is not selective_scan:
            x, log_decay = (tensor[t] for tensor in given)
            log = op is log_scan
            h = ((log_decay + h).exp() + x.exp()).log() if log else log_decay.exp() * h + x
            outputs.append(h)
        else:
            x, step, k, q = (given[i][t] for i in (0, 1, 3, 4))
            h = (step * given[2]).exp() * h + k[:, None] * x
            outputs.append(q @ h)
    return torch.stack(outputs) if outputs else given[0], h


def by_definition(op, tensors, lengths, packed):
    *given, state = tensors
    rows = []
    for row, h in enumerate(state):
        start, stop = (sum(lengths[:row]), sum(lengths[: row + 1])) if packed else (0, lengths[0])
        own = [x if len(x) == K else x[0 if packed else row, start:stop] for x in given]
        rows.append(define(op, own, h))
    outputs, states = zip(*rows, strict=True)
    return torch.cat(outputs)[None] if packed else torch.stack(outputs), torch.stack(states)


@every_op
@every_paradigm
@every_layout
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 64])
def test_output_state_and_gradients_match_the_definition(op, paradigm, lengths, packed, chunk_size):
    given, boundaries = tensors(op, lengths, packed)
    *rest, state = given
    call = partial(op, *rest, paradigm=paradigm, chunk_size=chunk_size, cu_seqlens=boundaries)
    found = tuple(call(initial_state=state, output_final_state=True))
    expected = by_definition(op, given, lengths, packed)
    exactly(found, expected)
    above = [torch.randn_like(y) for y in expected]
    for kept in ([0, 1], [0], [1]):  # a gradient of both, and of either alone
        exactly(*(_gradients(results, given, above, kept) for results in (found, expected)))
    # without a state, and where none is wanted
    plain = call()
    assert plain.final_state is None
    exactly(plain.output, by_definition(op, [*rest, torch.full_like(state, NOTHING.get(op, 0))], lengths, packed)[0])


def _gradients(results, leaves, above, kept):
    results, above = ([values[i] for i in kept] for values in (results, above))
    return torch.autograd.grad(results, leaves, above, retain_graph=True, materialize_grads=True)


@every_paradigm
def test_scan_accepts_any_state_shape_and_input_strides(paradigm):
    x, log_decay = randn(2, 3, 11, 4).permute(0, 2, 3, 1), -torch.rand(11, 2, 4, 3, dtype=torch.float64).transpose(0, 1)
    found = scan(x, log_decay, paradigm=paradigm, chunk_size=4, output_final_state=True)
    flat = scan(x.flatten(2), log_decay.flatten(2), chunk_size=4, output_final_state=True)
    exactly(found.output.flatten(2), flat.output)
    exactly(found.final_state.flatten(1), flat.final_state)


@every_op
@every_paradigm
@pytest.mark.parametrize("strength", [1e-6, 30.0, 1e4])
def test_very_strong_or_weak_decays_are_accurate_in_float32(op, paradigm, strength):
    # the sums over a block are far below what exp keeps, or almost 0
    given, _ = tensors(op, [96], False, strength=strength)
    given = [x.detach().float().requires_grad_() for x in given]
    exact = [x.detach().double().requires_grad_() for x in given]
    found = tuple(op(*given[:-1], initial_state=given[-1], output_final_state=True, paradigm=paradigm, chunk_size=16))
    expected = by_definition(op, exact, [96], False)
    above = [torch.randn_like(y) for y in expected]
    gradients = torch.autograd.grad(found, given, [a.float() for a in above])
    exact_gradients = torch.autograd.grad(expected, exact, above)
    for mine, wanted in zip((*found, *gradients), (*expected, *exact_gradients), strict=True):
        assert mine.isfinite().all()
        scale = wanted.abs().mean() + 1e-30
        assert (mine.double() - wanted).abs().max() <= 1e-4 * scale + 1e-5 * wanted.abs().max()


@every_op
def test_bfloat16_scans_keep_wide_states_and_sums(op):
    given, _ = tensors(op, [400], False, strength=0.01, reset=0, dtype=torch.bfloat16)
    *rest, state = given
    found = op(*rest, initial_state=state.float(), output_final_state=True)
    exact = op(*(x.double() for x in rest), initial_state=state.double(), output_final_state=True)
    wide = torch.float64 if op is log_scan else torch.float32
    assert (found.output.dtype, found.final_state.dtype) == (torch.bfloat16, wide)
    assert (found.final_state - exact.final_state).norm() <= 1e-5 * exact.final_state.norm()
    assert (found.output - exact.output).norm() <= 4e-3 * exact.output.norm()


@every_op
@pytest.mark.parametrize("packed", [False, True])
def test_scan_compiles_into_one_graph(op, packed, counter):
    given, boundaries = tensors(op, [4, 9] if packed else [13, 13], packed)
    *rest, state = (x.detach() for x in given)

    @torch.compile(backend=counter, fullgraph=True)
    def call(*rest):
        return op(*rest, initial_state=state, output_final_state=True, cu_seqlens=boundaries, chunk_size=4)

    exactly(tuple(call(*rest)), tuple(op(*rest, initial_state=state, output_final_state=True, cu_seqlens=boundaries)))
    assert counter.frame_count == 1


@every_op
@pytest.mark.parametrize("packed", [False, True])
def test_scan_op_passes_opcheck(op, packed):
    given, boundaries = tensors(op, [4, 9] if packed else [13, 13], packed)
    numbers = None if boundaries is None else boundaries.tolist()
    arguments = (*given, boundaries, numbers, 4, True, False, True)
    torch.library.opcheck(getattr(torch.ops.seqmix, op.__name__).default, arguments)


@pytest.mark.parametrize("op", [scan, selective_scan, diagonal_scan])
def test_scan_saves_one_state_per_block_for_backward(op):
    given, _ = tensors(op, [640], False)
    saved = []

    def pack(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        op(*given[:-1], initial_state=given[-1], chunk_size=16)
    inputs = {x.untyped_storage().data_ptr() for x in given}
    others = [x for x in saved if x.untyped_storage().data_ptr() not in inputs]
    assert sum(x.numel() for x in others) == 640 // 16 * given[-1].numel()


def test_invalid_arguments_raise():
    x, a = randn(2, 4, C), -torch.ones(2, 4, C, dtype=torch.float64)
    for wrong in (a[:, :3], a[..., :1]):
        with pytest.raises(SeqmixError, match=r"\[2, 4, 5\]"):
            scan(x, wrong)
    with pytest.raises(SeqmixError, match="T >= 1"):
        scan(x[:, :0], a[:, :0])
    with pytest.raises(SeqmixError, match="got parallel"):
        scan(x, a, paradigm="parallel")
    with pytest.raises(SeqmixError, match=r"initial state must be \[2, 5\]"):
        scan(x, a, initial_state=randn(2, 4))
    with pytest.raises(SeqmixError, match="B = 1"):
        scan(x, a, cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(SeqmixError, match="chunk_size"):
        scan(x, a, chunk_size=0)
    with pytest.raises(SeqmixError, match="floating-point"):
        scan(x.long(), a)
    with pytest.raises(SeqmixError, match="forward-mode"):
        torch.func.jvp(lambda x: scan(x, a).output, (x,), (x,))
    with pytest.raises(SeqmixError, match=r"q \[B T K\]"):
        selective_scan(x, x, a[0, :K], randn(2, 4, K), randn(2, 4, K + 1))


@every_op
def test_recurrent_step_matches_chunkwise_and_has_forward_mode(op):
    given, _ = tensors(op, [1, 1], False)
    *rest, state = (x.detach() for x in given)
    call = partial(op, initial_state=state, output_final_state=True)
    exactly(tuple(call(*rest, paradigm=Paradigm.RECURRENT)), tuple(call(*rest, paradigm=Paradigm.CHUNKWISE)))
    _, tangent = torch.func.jvp(lambda x: call(x, *rest[1:], paradigm="recurrent").output, (rest[0],), (rest[0],))
    assert tangent.isfinite().all()
