"""The delta family beside its kernel checks (test_kernels.py): what it means, its numerics, compilers, refusals."""

import math
from functools import partial

import pytest
import torch
from recurrences import CPU, INPUTS, case_of, differentiate, run
from torch.testing import assert_close

from seqmix.ops.delta import delta_flops, delta_rule, unit_norm
from seqmix.ops.kernels import reference
from seqmix.ops.paradigm import Paradigm
from seqmix.registry import SeqmixError
from seqmix.testing import reproduce_kernel
from seqmix.testing.counting import count_flops
from seqmix.testing.kernel_families import DeltaCase

PARADIGMS = [Paradigm.RECURRENT, Paradigm.CHUNKWISE]
case_of = partial(case_of, kind=DeltaCase, strength=0.3, rate=2.0)  # betas from 0 to 2
every_paradigm = pytest.mark.parametrize("paradigm", PARADIGMS)
every_decay = pytest.mark.parametrize("log_decay", [None, "H", "B T H"])
exactly = partial(assert_close, rtol=1e-9, atol=1e-9)


@every_paradigm
@every_decay
@pytest.mark.parametrize("lengths", [[130, 130], [63, 0, 70]], ids=str)
def test_more_tokens_than_a_block_of_saved_states(paradigm, log_decay, lengths):
    case = case_of(log_decay, lengths, packed=len(lengths) > 2, n_heads=1, chunk_size=48)
    reproduce_kernel("gradients_are_the_definitions", reference("delta", paradigm), case)


@every_paradigm
def test_a_worked_example(paradigm):
    # the state decays to 1/2, then half of the error is written: 4/2 + (3 - 2)/2, 2.5/2 + (1 - 1.25)/2
    q, k, v = (torch.tensor(x, dtype=torch.float64).reshape(1, 2, 1, 1) for x in ([1, 2], [1, 1], [3, 1]))
    beta, log_decay = torch.full((1, 2, 1), 0.5), torch.tensor([-math.log(2)], dtype=torch.float64)
    state = torch.full((1, 1, 1, 1), 4.0, dtype=torch.float64)
    output, final = delta_rule(
        q, k, v, beta, log_decay, initial_state=state, output_final_state=True, paradigm=paradigm
    )
    exactly(output.flatten(), torch.tensor([2.5, 2.25], dtype=torch.float64))
    exactly(final.item(), 1.125)


@every_paradigm
def test_what_was_written_is_read_and_replaced(paradigm):
    # orthogonal keys with beta 1 are a table
    keys, values = torch.eye(4, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    k = keys[[0, 1, 2, 3, 1, 1]][None, :, None]
    options = {"scale": 1.0, "output_final_state": True, "chunk_size": 4, "paradigm": paradigm}
    output, state = delta_rule(k, k, values[None, :6, None], torch.ones(1, 6, 1), None, **options)
    exactly(output[0, :, 0], values[:6])
    exactly(state[0, 0], values[[0, 5, 2, 3]])


def test_all_tokens_at_once_are_a_triangular_inverse():
    # what the module says of the parallel form: one chunk is one
    inputs = case_of(None, [9, 9]).inputs(CPU)
    q, k, v, b = (x.transpose(1, 2) for x in (*(inputs[name] for name in "qkv"), inputs["beta"][..., None]))
    written = torch.linalg.inv(torch.eye(9) + (b * k @ k.mT).tril(-1)) @ (b * v)
    expected = 0.7 * ((q @ k.mT).tril() @ written).transpose(1, 2)
    exactly(delta_rule(*(inputs[name] for name in INPUTS[:4]), None, scale=0.7).output, expected)


@every_paradigm
@pytest.mark.parametrize("reset", [0, 3, 4, 15])
def test_nothing_is_left_of_what_is_before_a_reset(paradigm, reset):
    case = case_of("B T H", [20, 20], resets=(reset,), chunk_size=20 if reset > 8 else 4)
    inputs = {name: x.requires_grad_() for name, x in case.inputs(CPU).items()}
    output, state = run(case, paradigm, inputs)
    later = {name: x[:, reset:] for name, x in inputs.items() if name != "state"}
    exactly((output[:, reset:], state), run(case, paradigm, later))
    gradients = torch.autograd.grad(output[:, reset:].sum(), list(inputs.values()))
    for name, gradient in zip(inputs, gradients, strict=True):
        before = gradient if name == "state" else gradient[:, :reset]
        exactly(before, torch.zeros_like(before))


@every_paradigm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_one_direction_are_well_behaved(paradigm, dtype):
    # the hardest triangular system: every key the same, and every transition a reflection
    case = case_of(None, [1000, 1000], key_width=4, chunk_size=64, dtype=dtype)
    inputs = case.inputs(CPU) | {"beta": torch.full((2, 1000, 2), 2.0)}
    inputs["k"] = torch.full_like(inputs["k"], 0.5)
    exact = run(case, Paradigm.RECURRENT, {name: x.double() for name, x in inputs.items()})
    for actual, expected in zip(run(case, paradigm, inputs), exact, strict=True):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error <= (1e-4 if dtype == torch.float32 or actual.dtype == torch.float32 else 3e-3)


@every_paradigm
@pytest.mark.parametrize("length", [1, 9])
def test_autocast_changes_nothing(paradigm, length):
    case = case_of("B T H", [length], dtype=torch.float32)
    plain = run(case, paradigm, case.inputs(CPU))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(run(case, paradigm, case.inputs(CPU)), plain, rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [[17, 17], [5, 0, 1, 11], [1, 1]], ids=str)
@every_paradigm
def test_compiles_into_one_graph_with_gradients(paradigm, lengths):
    torch._dynamo.reset()
    case = case_of("B T H", lengths, packed=len(lengths) > 2)
    function = torch.compile(delta_rule, fullgraph=True, backend="aot_eager")
    exactly(differentiate(case, paradigm, function=function), differentiate(case, paradigm))


@every_paradigm
def test_neither_data_nor_sizes_recompile(paradigm, counter):
    compiled = torch.compile(delta_rule, fullgraph=True, backend=counter)

    def compare(function, lengths):
        case = case_of("B T H", lengths, packed=True)
        exactly(run(case, paradigm, case.inputs(CPU), function), run(case, paradigm, case.inputs(CPU)))

    for lengths in ([4, 5, 3], [0, 12, 0]):
        compare(compiled, lengths)
    assert counter.frame_count == 1
    for length in (13, 20):
        compare(compiled, [0, 1, length])
    assert counter.frame_count == 2
    # no two of the sizes are equal, which a compiler would take for one
    dynamic = torch.compile(delta_rule, fullgraph=True, backend=counter, dynamic=True)
    for documents in (6, 7, 8):
        compare(dynamic, [1] * (documents - 1) + [25 - documents])
    assert counter.frame_count == 3


@pytest.mark.parametrize(("length", "chunk_size"), [(1, 4), (4, 4), (11, 4), (12, 4), (3, 8)])
@pytest.mark.parametrize("context", [0, 5])
@every_paradigm
def test_flops_are_what_a_counter_counts(paradigm, context, length, chunk_size):
    sizes = {"n_heads": 3, "key_width": 4, "value_width": 6, "chunk_size": chunk_size, "initial_state": bool(context)}
    case = case_of("H", [length] * 2, final_state=False, **sizes)
    counted = count_flops(lambda: run(case, paradigm, case.inputs(CPU))) // (2 * 3)  # rows and heads
    declared = delta_flops(paradigm, length, 4, 6, chunk_size=chunk_size, context=context)
    if paradigm is Paradigm.CHUNKWISE:
        assert counted == declared
        return
    # outer products are done as elementwise ones; the loop reads a state of zeros too
    reads = length if context or length > 1 else 0
    assert counted == (length + reads) * 2 * 4 * 6
    assert declared == counted + (length - (reads > 0 and not context)) * 2 * 4 * 6


def test_keys_are_made_of_norm_one_and_zeros_stay_zeros():
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    exactly(unit_norm(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        large = torch.full((2, 64), 3e3, dtype=dtype, requires_grad=True)  # whose squares leave float16
        assert_close(unit_norm(large).float(), torch.full((2, 64), 0.125), rtol=1e-5, atol=0)
        zeros = torch.zeros(2, 64, dtype=dtype, requires_grad=True)
        unit_norm(zeros).sum().backward()
        assert not unit_norm(zeros).any()
        assert zeros.grad.isfinite().all()


@every_paradigm
def test_zero_inputs_have_finite_gradients(paradigm):
    case = case_of("B T H", [9], resets=tuple(range(9)))
    inputs = {name: torch.zeros_like(x).requires_grad_() for name, x in case.inputs(CPU).items()}
    outputs = run(case, paradigm, inputs)
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs), list(inputs.values()))
    assert all(x.isfinite().all() for x in (*outputs, *gradients))


Q, K, V, B = torch.randn(2, 6, 2, 4), torch.randn(2, 6, 2, 4), torch.randn(2, 6, 2, 3), torch.rand(2, 6, 2)


@pytest.mark.parametrize(
    ("tensors", "options", "named"),
    [
        ((Q, K, V, B[..., None], None), {}, r"beta .* 2, 6, 2; .* \[2, 6, 2, 1\]"),
        ((Q, K, V, B.long(), None), {}, "beta .* int64"),
        ((Q, K, V, B, torch.zeros(2, 6, 2, 4)), {}, r"\[H\] or \[B T H\] .* \[2, 6, 2, 4\]"),
        ((Q, K, V, B, None), {"initial_state": torch.zeros(2, 2, 3, 4)}, r"\[2, 2, 4, 3\].* \[2, 2, 3, 4\]"),
        ((Q, K, V, B), {"paradigm": Paradigm.PARALLEL}, "parallel .* chunkwise, recurrent"),
        ((Q, K, V, B), {"chunk_size": 0}, "chunk_size .* 0"),
    ],
)
def test_what_does_not_fit_is_refused(tensors, options, named):
    with pytest.raises(SeqmixError, match=named):
        delta_rule(*tensors, **options)
    with pytest.raises(SeqmixError, match="parallel"):
        delta_flops(Paradigm.PARALLEL, 4, 2, 2)
