"""Causal convolutions against a definition in plain Python, with and without a state, packed or not."""

import itertools
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from seqmix.ops.convolution import long_convolution, short_convolution
from seqmix.ops.convolution.long import _fast_size
from seqmix.ops.runtime.paradigm import Paradigm
from seqmix.registry import SeqmixError

D = 5
both = pytest.mark.parametrize("paradigm", [Paradigm.PARALLEL, Paradigm.RECURRENT])
every_layout = pytest.mark.parametrize(
    ("lengths", "packed"),
    [([1, 1, 1], False), ([3, 3], False), ([9, 9], False), ([7], True), ([0, 3, 0, 1, 2, 5, 0], True)],
    ids=str,
)
exactly = partial(assert_close, rtol=1e-9, atol=1e-9)
randn = partial(torch.randn, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tensors(lengths, packed, filters, past, dtype=torch.float64):
    """Inputs, filters and state, which need gradients, and boundaries, in both of their dtypes."""
    batch, length = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    shapes = (batch, length, D), (D, filters), (len(lengths), past, D)
    like = torch.int32 if len(lengths) == 1 else torch.int64
    boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=like) if packed else None
    return *(randn(*shape).to(dtype).requires_grad_() for shape in shapes), boundaries


def define(x, filters, past, grows):
    """For one sequence, [T D]: outputs, and the inputs read, or as many of them as there were."""
    seen, outputs = [*past, *x], []
    for t in range(len(past), len(seen)):
        reach = min(t + 1, filters.shape[1])
        outputs.append(sum(filters[:, i] * seen[t - i] for i in range(reach)))
    read = seen if grows else seen[len(x) :]
    return torch.stack(outputs) if outputs else x, torch.stack(read) if read else past


def by_definition(x, filters, past, lengths, packed, grows=False):
    rows = zip(x[0].split(lengths) if packed else x, past, strict=True)
    outputs, states = zip(*(define(part, filters, before, grows) for part, before in rows), strict=True)
    # every row gets room for all tokens
    slots = past.shape[1] + x.shape[1] if grows else past.shape[1]
    states = [torch.cat((row.new_zeros(slots - len(row), D), row)) for row in states]
    return torch.cat(outputs)[None] if packed else torch.stack(outputs), torch.stack(states)


def equal(results, expected, leaves):
    """Outputs, states and gradients."""
    exactly(tuple(results), tuple(expected))
    exactly(*(gradients(found, leaves) for found in (results, expected)))


def gradients(results, leaves):
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, dtype=y.dtype, generator=generator)).sum() for y in results)
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


@pytest.mark.parametrize("kernel_size", [1, 2, 4])
@every_layout
def test_short_convolution_matches_its_definition(kernel_size, lengths, packed):
    x, weight, state, boundaries = tensors(lengths, packed, kernel_size, kernel_size - 1)
    bias, options = randn(D, requires_grad=True), {"cu_seqlens": boundaries}
    results = short_convolution(x, weight, bias, initial_state=state, output_final_state=True, **options)
    output, last = by_definition(x, weight.flip(1), state, lengths, packed)
    equal(results, (output + bias, last), (x, weight, bias, state))
    plain = short_convolution(x, weight, **options)
    assert plain.final_state is None
    exactly(plain.output, short_convolution(x, weight, bias * 0, initial_state=state * 0, **options).output)


@both
@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("past", [0, 1, 6])
@pytest.mark.parametrize("reach", [1, 4, 9, 20])
@every_layout
def test_long_convolution_matches_its_definition(paradigm, grows, past, reach, lengths, packed):
    x, filters, state, boundaries = tensors(lengths, packed, reach, past)
    call = partial(long_convolution, x, filters, paradigm=paradigm, cu_seqlens=boundaries)
    results = call(initial_state=state, output_final_state=True, grows=grows)
    equal(results, by_definition(x, filters, state, lengths, packed, grows), (x, filters, state))
    nothing = call()
    assert nothing.final_state is None
    exactly(nothing.output, call(initial_state=state * 0).output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_convolution_accumulates_in_higher_precision(dtype):
    x, weight, state, _ = tensors([50, 50], False, 4, 3, dtype)
    large = torch.full_like(x, 50000.0), torch.tensor([[1.0, 1.0, -1.0, -0.5]], dtype=dtype).expand(D, -1)
    for arguments in ((x, weight, randn(D).to(dtype)), large):
        results = short_convolution(*arguments, initial_state=state, output_final_state=True)
        assert results.output.dtype == results.final_state.dtype == dtype
        wide = short_convolution(*(a.double() for a in arguments), initial_state=state.double())
        assert_close(results.output, wide.output.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
        if arguments is not large:
            dx, wide_dx = (torch.autograd.grad(y.output.sum(), x)[0] for y in (results, wide))
            assert_close(dx, wide_dx, rtol=torch.finfo(dtype).eps, atol=1e-6)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_convolution_accumulates_in_higher_precision_and_keeps_dtypes(paradigm, dtype):
    x, filters, state = randn(2, 50, D).to(dtype), randn(D, 60), randn(2, 9, D).float()
    for length in (1, 50):
        results = long_convolution(
            x[:, :length], filters.float(), initial_state=state, output_final_state=True, paradigm=paradigm
        )
        assert (results.output.dtype, results.final_state.dtype) == (dtype, torch.float32)
        wide = long_convolution(x[:, :length].double(), filters, initial_state=state.double(), paradigm=paradigm).output
        assert_close(results.output, wide.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    # of ones and minus ones, the sums on the way do not fit into float16
    large = torch.full((1, 8, D), 30000.0, dtype=dtype)
    filters = torch.tensor([[1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0]]).expand(D, -1)
    y = long_convolution(large, filters, paradigm=paradigm)
    assert_close(y.output[:, -1], 0 * large[:, -1], rtol=0, atol=0.1)


LONG = [
    partial(long_convolution, paradigm=p, grows=grows) for p in ("parallel", "recurrent") for grows in (False, True)
]


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("convolution", [short_convolution, *LONG])
def test_convolution_compiles_once_for_all_lengths(packed, convolution, counter):
    function = partial(convolution, output_final_state=True)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for length in (9, 5, 17):
        short = convolution is short_convolution
        lengths = [2, 0, length - 2] if packed else [length, length]
        x, filters, state, boundaries = tensors(lengths, packed, 4 if short else length + 30, 3 if short else 30)
        results, expected = (f(x, filters, initial_state=state, cu_seqlens=boundaries) for f in (compiled, function))
        equal(results, expected, (x, filters, state))
    assert counter.frame_count == 1


def test_long_convolution_op_passes_opcheck():
    x, filters = randn(1, 7, D, requires_grad=True), randn(D, 6, requires_grad=True)
    packed = torch.tensor([0, 2, 2, 7])
    for cu_seqlens, known, past in ((None, None, 1), (packed, None, None), (packed, packed.tolist(), 3)):
        state = None if past is None else randn(past, 4, D, requires_grad=True)
        for direct in (False, True):
            arguments = (x, filters, state, cu_seqlens, known, direct)
            torch.library.opcheck(torch.ops.seqmix.long_convolution.default, arguments)


def test_fast_size_rounds_up_to_an_efficient_fft_size():
    assert [_fast_size(n) for n in (1, 2, 7, 9, 17, 4095, 4097)] == [1, 2, 8, 9, 18, 4096, 4608]


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": randn(2, 0, D)}, r"T >= 1.* \[2, 0, 5\], \[5, 4\]"),
        ({"filters": randn(D, 0)}, r"\[2, 3, 5\], \[5, 0\]"),
        ({"filters": randn(D + 1, 4)}, r"\[2, 3, 5\], \[6, 4\]"),
        ({"filters": torch.ones(D, 3, dtype=torch.int64)}, "int64"),
        ({"initial_state": randn(3, 4, D)}, r"state .*\[2, (3|P), 5\].* \[3, 4, 5\]"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "B = 1.* 2"),
        ({"x": randn(1, 3, D), "cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens .* 3, .*tokens"),
    ],
)
def test_mismatched_arguments_raise(short, change, named):
    given = {"x": randn(2, 3, D), "filters": randn(D, 4)} | change
    x, filters = given.pop("x"), given.pop("filters")
    with pytest.raises(SeqmixError, match=named):
        short_convolution(x, filters, **given) if short else long_convolution(x, filters, paradigm="parallel", **given)


def test_invalid_bias_or_paradigm_raises():
    with pytest.raises(SeqmixError, match=r"bias .*\[5\].* \[1\]"):
        short_convolution(randn(2, 3, D), randn(D, 4), randn(1))
    with pytest.raises(SeqmixError, match=r"parallel .*recurrent.* chunkwise"):
        long_convolution(randn(2, 3, D), randn(D, 4), paradigm=Paradigm.CHUNKWISE)


@both
@pytest.mark.parametrize("length", [1, 3])
def test_long_convolution_has_forward_mode_only_for_a_recurrent_token(paradigm, length):
    x, filters = randn(2, length, D), randn(D, 4)
    tangent = partial(torch.func.jvp, lambda x: long_convolution(x, filters, paradigm=paradigm).output, (x,), (x,))
    if length == 1 and paradigm is Paradigm.RECURRENT:
        exactly(tangent()[1], x * filters[:, 0])
        return
    with pytest.raises(SeqmixError, match="forward-mode"):
        tangent()
