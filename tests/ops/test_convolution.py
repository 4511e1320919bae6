"""Causal convolutions against their definitions, in Python lists, from every state, packed or not."""

import itertools
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from torch.testing import assert_close

from seqmix.ops.convolution import long_convolution, short_convolution
from seqmix.ops.convolution.long import _fast_size
from seqmix.ops.paradigm import Paradigm
from seqmix.registry import SeqmixError

D = 5
both = pytest.mark.parametrize("paradigm", [Paradigm.PARALLEL, Paradigm.RECURRENT])
exactly = partial(assert_close, rtol=1e-9, atol=1e-9)
randn = partial(torch.randn, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tensors(rows, batch, length, kernel_size, dtype=torch.float64):
    """x, weight, bias and initial state."""
    shapes = ((batch, length, D), (D, kernel_size), (D,), (rows, kernel_size - 1, D))
    return [randn(*shape).to(dtype).requires_grad_() for shape in shapes]


def short_of_one(x, weight, bias, state):
    """The definition for one sequence, [T D]: outputs, and the last inputs."""
    seen, kernel_size = [*state, *x], weight.shape[1]
    outputs = [
        bias + sum(weight[:, kernel_size - 1 - i] * seen[kernel_size - 1 + t - i] for i in range(kernel_size))
        for t in range(len(x))
    ]
    return torch.stack(outputs) if outputs else x, torch.stack(seen[len(x) :]) if kernel_size > 1 else state


def gradients(results, leaves):
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, dtype=y.dtype, generator=generator)).sum() for y in results)
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


@pytest.mark.parametrize("kernel_size", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_short_is_the_definition(kernel_size, length):
    leaves = x, weight, bias, state = tensors(3, 3, length, kernel_size)
    results = short_convolution(x, weight, bias, initial_state=state, output_final_state=True)
    rows = [short_of_one(*row) for row in zip(x, [weight] * 3, [bias] * 3, state, strict=True)]
    expected = [torch.stack(part) for part in zip(*rows, strict=True)]
    exactly(list(results), expected)
    exactly(gradients(results, leaves), gradients(expected, leaves))
    plain = short_convolution(x, weight)
    assert plain.final_state is None
    exactly(plain.output, short_convolution(x, weight, bias * 0, initial_state=state * 0).output)


@pytest.mark.parametrize("kernel_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[7], [0, 3, 0, 1, 2, 5, 0], [0, 0, 1]])
def test_short_of_documents_is_that_of_each_alone(kernel_size, dtype, lengths):
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)
    leaves = x, weight, bias, state = tensors(len(lengths), 1, sum(lengths), kernel_size)
    results = short_convolution(x, weight, bias, initial_state=state, output_final_state=True, cu_seqlens=borders)
    documents = [short_of_one(part, weight, bias, row) for part, row in zip(x[0].split(lengths), state, strict=True)]
    outputs, states = zip(*documents, strict=True)
    expected = [torch.cat(outputs)[None], torch.stack(states)]
    exactly(list(results), expected)
    exactly(gradients(results, leaves), gradients(expected, leaves))


def test_short_state_keeps_nothing_else_alive():
    x, weight, _, _ = tensors(1, 1, 1000, 4)
    for borders in (None, torch.tensor([0, 1000])):
        with torch.no_grad():
            _, last = short_convolution(x, weight, output_final_state=True, cu_seqlens=borders)
        assert last.untyped_storage().nbytes() == 3 * D * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_sums_are_wide(dtype):
    x, weight, bias, state = tensors(2, 2, 50, 4, dtype)
    large = torch.full_like(x, 50000.0), torch.tensor([[1.0, 1.0, -1.0, -0.5]], dtype=dtype).expand(D, -1)
    for arguments in ((x, weight, bias), large):
        results = short_convolution(*arguments, initial_state=state, output_final_state=True)
        assert results.output.dtype == results.final_state.dtype == dtype
        wide = short_convolution(*(a.double() for a in arguments), initial_state=state.double())
        assert_close(results.output, wide.output.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
        if arguments is large:
            continue
        above = torch.ones_like(results.output)
        (dx,), (wide_dx,) = (torch.autograd.grad(y.output, (x,), above.to(y.output.dtype)) for y in (results, wide))
        assert_close(dx, wide_dx, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_short_compiles_once(packed):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(short_convolution, fullgraph=True, dynamic=True, backend=counter)
    for length in (9, 5, 17, 300):
        borders = torch.tensor([0, 2, 2, length]) if packed else None
        leaves = x, weight, bias, state = tensors(3 if packed else 2, 1 if packed else 2, length, 4)
        options = {"initial_state": state, "output_final_state": True, "cu_seqlens": borders}
        results, expected = (function(x, weight, bias, **options) for function in (compiled, short_convolution))
        exactly(list(results), list(expected))
        exactly(gradients(results, leaves), gradients(expected, leaves))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": randn(2, 0, D)}, r"T >= 1, and the weight \[D W\] with W >= 1; given are \[2, 0, 5\], \[5, 4\]"),
        ({"weight": randn(D + 1, 4)}, r"given are \[2, 3, 5\], \[6, 4\]"),
        ({"weight": randn(D, 0)}, r"given are \[2, 3, 5\], \[5, 0\]"),
        ({"x": torch.ones(2, 3, D, dtype=torch.int64)}, "int64"),
        ({"bias": randn(1)}, r"bias must be \[5\], and is \[1\]"),
        ({"initial_state": randn(2, 4, D)}, r"initial state must be \[2, 3, 5\], and is \[2, 4, 5\]"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "one row .* the batch is 2"),
        ({"x": randn(1, 3, D), "cu_seqlens": torch.tensor([0, 2])}, "must rise from 0 to the 3 tokens"),
    ],
)
def test_short_refuses_what_does_not_fit(change, sentence):
    with pytest.raises(SeqmixError, match=sentence):
        short_convolution(**{"x": randn(2, 3, D), "weight": randn(D, 4)} | change)


def long_of_one(x, filters, past, grows):
    """The definition for one sequence, [T D]: outputs, and the inputs read."""
    seen, outputs = [*past, *x], []
    for t in range(len(past), len(seen)):
        reach = min(t + 1, filters.shape[1])
        outputs.append(sum(filters[:, i] * seen[t - i] for i in range(reach)))
    kept = seen if grows else seen[len(x) :]
    return torch.stack(outputs) if outputs else x, torch.stack(kept) if kept else past


@both
@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("past", [0, 1, 6])
@pytest.mark.parametrize(("length", "reach"), [(1, 1), (1, 7), (5, 1), (5, 4), (5, 20), (9, 9), (16, 15)])
def test_long_is_the_definition(paradigm, grows, past, length, reach):
    leaves = x, filters, state = [randn(*s).requires_grad_() for s in ((3, length, D), (D, reach), (3, past, D))]
    results = long_convolution(x, filters, initial_state=state, output_final_state=True, paradigm=paradigm, grows=grows)
    rows = [long_of_one(part, filters, before, grows) for part, before in zip(x, state, strict=True)]
    expected = [torch.stack(part) for part in zip(*rows, strict=True)]
    exactly(list(results), expected)
    exactly(gradients(results, leaves), gradients(expected, leaves))
    nothing = long_convolution(x, filters, paradigm=paradigm)
    assert nothing.final_state is None
    exactly(nothing.output, long_convolution(x, filters, initial_state=state * 0, paradigm=paradigm).output)


@both
@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[7], [0, 3, 0, 1, 2, 5, 0], [0, 0, 1]])
def test_long_of_documents_is_that_of_each_alone(paradigm, grows, past, dtype, lengths):
    borders, length, rows = torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype), sum(lengths), len(lengths)
    leaves = x, filters, state = [randn(*s).requires_grad_() for s in ((1, length, D), (D, 9), (rows, past, D))]
    options = {"initial_state": state, "output_final_state": True, "grows": grows, "cu_seqlens": borders}
    results = long_convolution(x, filters, paradigm=paradigm, **options)
    documents = [long_of_one(*row, grows) for row in zip(x[0].split(lengths), [filters] * rows, state, strict=True)]
    outputs, states = zip(*documents, strict=True)
    # every row gets room for all tokens
    room = past + length if grows else past
    states = [torch.cat((row.new_zeros(room - len(row), D), row)) for row in states]
    expected = [torch.cat(outputs)[None], torch.stack(states)]
    exactly(list(results), expected)
    exactly(gradients(results, leaves), gradients(expected, leaves))


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_sums_are_wide_and_dtypes_are_kept(paradigm, dtype):
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


@both
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("grows", [False, True])
def test_long_compiles_once(paradigm, packed, grows):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = partial(long_convolution, paradigm=paradigm, output_final_state=True, grows=grows)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for length in (9, 5, 17, 100):
        borders, rows = (torch.tensor([0, 2, 2, length]), 3) if packed else (None, 2)
        shapes = ((1 if packed else 2, length, D), (D, length + 30), (rows, 30, D))
        leaves = x, filters, state = [randn(*shape).requires_grad_() for shape in shapes]
        results, expected = (f(x, filters, initial_state=state, cu_seqlens=borders) for f in (compiled, function))
        exactly(list(results), list(expected))
        exactly(gradients(results, leaves), gradients(expected, leaves))
    assert counter.frame_count == 1


def test_long_op_is_well_formed():
    for borders in (None, torch.tensor([0, 2, 2, 7])):
        x, filters, state = (
            randn(*s).requires_grad_() for s in ((1, 7, D), (D, 6), (1 if borders is None else 3, 4, D))
        )
        known = [None] if borders is None else [None, borders.tolist()]
        for direct, past, boundaries in itertools.product((False, True), (None, state), known):
            arguments = (x, filters, past, borders, boundaries, direct)
            torch.library.opcheck(torch.ops.seqmix.long_convolution.default, arguments)


@pytest.mark.parametrize(("at_least", "size"), [(1, 1), (2, 2), (7, 8), (9, 9), (17, 18), (4095, 4096), (4097, 4608)])
def test_sizes_are_fast(at_least, size):
    assert _fast_size(at_least) == size


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"paradigm": Paradigm.CHUNKWISE}, "parallel or recurrent, not chunkwise"),
        ({"x": randn(2, 0, D)}, r"T >= 1, and the filters \[D L\] with L >= 1; given are \[2, 0, 5\], \[5, 4\]"),
        ({"filters": randn(D, 0)}, r"given are \[2, 3, 5\], \[5, 0\]"),
        ({"filters": torch.ones(D, 3, dtype=torch.int64)}, "int64"),
        ({"initial_state": randn(3, 4, D)}, r"initial state must be \[2 P 5\], and is \[3, 4, 5\]"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "one row .* the batch is 2"),
    ],
)
def test_long_refuses_what_does_not_fit(change, sentence):
    given = {"paradigm": Paradigm.PARALLEL, "x": randn(2, 3, D), "filters": randn(D, 4)} | change
    with pytest.raises(SeqmixError, match=sentence):
        long_convolution(**given)


@both
def test_long_refuses_tangents(paradigm):
    x = randn(2, 3, D)
    with pytest.raises(SeqmixError, match="no forward-mode differentiation"):
        torch.func.jvp(lambda x: long_convolution(x, randn(D, 4), paradigm=paradigm).output, (x,), (x,))
