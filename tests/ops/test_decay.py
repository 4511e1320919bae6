"""The decay family beyond its kernel checks (test_kernels.py): groups of chunks, resets, numerics, compilation."""

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from recorded_operations import Watched
from recurrence_calls import CPU, INPUTS, case_of, differentiate, run
from torch.testing import assert_close

from seqmix.ops.decay import decay, decay_flops
from seqmix.ops.decay.chunkwise import _DecayChunks
from seqmix.ops.recurrence import chunk_loop as chunkwise
from seqmix.ops.recurrence import groups as chunks
from seqmix.ops.recurrence import products
from seqmix.ops.recurrence import token_loop as recurrent
from seqmix.ops.runtime.call import Call
from seqmix.ops.runtime.custom_op import Gradients
from seqmix.ops.runtime.kernel import reference
from seqmix.ops.runtime.paradigm import Paradigm
from seqmix.registry import SeqmixError
from seqmix.testing import check_kernel, reproduce_kernel
from seqmix.testing.counting import count_flops

PARADIGMS = list(Paradigm)
OPS = [Paradigm.RECURRENT, Paradigm.CHUNKWISE]
"""The paradigms that are custom ops."""
DECAYS = [None, "H", "B T H", "B T H K"]
every_paradigm = pytest.mark.parametrize("paradigm", PARADIGMS)

exactly = partial(assert_close, rtol=1e-9, atol=1e-9)
bit_for_bit = partial(assert_close, rtol=0, atol=0)


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("elements", [1, 400])
@pytest.mark.parametrize("op", ["decay", "delta", "dplr"])
def test_recurrent_kernel_matches_definition_for_any_token_grouping(op, elements):
    checks = ["outputs_are_the_definitions", "gradients_are_the_definitions"]
    with mock.patch.object(recurrent, "CACHED_ELEMENTS", elements):
        assert check_kernel(reference(op, Paradigm.RECURRENT), checks=checks, examples=20).passed


@pytest.mark.parametrize("sizes", [(0, 5, 2, 3, 4), (2, 5, 2, 0, 4), (2, 5, 2, 3, 0)])
def test_empty_batch_or_head_gives_an_empty_state(sizes):
    batch, length, heads, key, value = sizes
    q, v = torch.ones(batch, length, heads, key), torch.ones(batch, length, heads, value)
    found = decay(q, q, v, scale=1.0, output_final_state=True, paradigm="recurrent")
    assert found.output.shape == v.shape
    assert found.final_state.shape == (batch, heads, key, value)


@pytest.mark.parametrize("shape", [(2,), (1, 70, 2), (1, 70, 2, 3)], ids=str)
@every_paradigm
def test_positive_log_decays_give_equal_states_in_every_paradigm(paradigm, shape):
    """Unlike a direct call, a call from a mixer does not check the log-decays."""
    q, k, v = torch.randn(3, 1, 70, 2, 3, dtype=torch.float64)
    log_decay = 0.3 * torch.rand(shape, dtype=torch.float64)
    state = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    growth = log_decay.exp().expand(70, 2) if len(shape) == 1 else log_decay[0].exp()
    expected = []
    for t in range(70):
        state = (growth[t][..., None] if len(shape) == 4 else growth[t][:, None, None]) * state
        state = state + k[:, t, :, :, None] * v[:, t, :, None]
        expected.append((q[:, t, :, None] @ state)[:, :, 0])
    found = decay(q, k, v, log_decay, Call.of(paradigm, 70, chunk_size=16), scale=1.0)
    exactly(found.output, torch.stack(expected, 1))


def test_reset_has_zero_gradient_where_products_overflow():
    q, v = torch.full((1, 4, 1, 2), 1e12), torch.full((1, 4, 1, 2), 1e15)
    log_decay = torch.tensor([[[0.0], [0.0], [-torch.inf], [0.0]]], requires_grad=True)
    found = decay(q, q, v, log_decay, scale=1.0, output_final_state=True, paradigm="recurrent")
    (found.final_state * 1e15).sum().backward()
    assert log_decay.grad[0, :3, 0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("elements", [1, 100, 400])
def test_chunkwise_kernel_matches_definition_for_any_chunk_grouping(elements):
    checks = ["outputs_are_the_definitions", "gradients_are_the_definitions"]
    with mock.patch.object(chunks, "CACHED_ELEMENTS", elements):
        report = check_kernel(reference("decay", Paradigm.CHUNKWISE), checks=checks, examples=60)
    assert report.passed, report


@pytest.mark.parametrize(
    ("elements", "least", "most"), [(chunks.CACHED_ELEMENTS, 9000, 13_000), (chunks.UNCACHED_ELEMENTS, 0, 500)]
)
def test_larger_chunk_groups_need_fewer_launches(elements, least, most, monkeypatch):
    """A GLA layer with 8 rows of 4,096 tokens runs chunk by chunk on a CPU and in a few hundred launches elsewhere."""
    layer = torch.empty(8, 4096, 4, 128, device="meta")
    assert chunks.max_chunks(layer, 128, 384) == 32
    assert chunks.max_chunks(layer[:, :300], 128, 384) == 2
    assert chunks.group_elements(CPU, 7) == 7
    monkeypatch.setattr(chunks, "CACHED_ELEMENTS", elements // 64)  # the model is 64 times as small
    x = case_of("B T H K", [4096], n_heads=1, key_width=64, value_width=128, chunk_size=128, dtype=torch.float32)
    x = x.call(x.inputs(CPU))._replace(needs_grad=True)
    with Watched() as watched:
        output, final, entries = chunkwise._forward(_DecayChunks, x)
        gradients = Gradients((output, final), (entries,), frozenset(["log_decay"]))
        chunkwise._backward(_DecayChunks, x, gradients)
    free = (
        "view",
        "slice",
        "select",
        "transpose",
        "squeeze",
        "strided",
        "permute",
        "split",
        "diagonal",
        "unbind",
        "empty",
    )
    launched = [func.name() for func, _ in watched.seen if not any(name in func.name() for name in free)]
    assert least <= len(launched) <= most, len(launched)


@every_paradigm
@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_output_and_gradients_have_float32_range_and_precision(paradigm, dtype, length):
    q, k, v = (torch.full((1, length, 1, 8), size, dtype=dtype, requires_grad=True) for size in (200.0, 2.0, 100.0))
    options = {"paradigm": paradigm, "scale": 1.0, "chunk_size": 16, "wide_output": True}
    # what is left of its sum has more digits than 16 bits have
    d_output = torch.tensor([1.0 + 2**-12, -1.0]).repeat(1, length, 1, 4) / 2**8
    with mock.patch.multiple(products, HAS_BFLOAT16=True, MIN_MULTIPLICATIONS=0):
        output = decay(q, k, v, **options).output
        found = torch.autograd.grad(output, [q, k, v], d_output)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = decay(*wide, **options).output
    assert output.dtype == torch.float32
    assert expected.min() > 65504
    assert_close(output, expected)
    for gradient, exact in zip(found, torch.autograd.grad(expected, wide, d_output), strict=True):
        assert_close(gradient, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


def test_bfloat16_products_match_the_definition():
    checks = ["outputs_are_the_definitions", "gradients_are_the_definitions", "a_cut_changes_nothing"]
    with mock.patch.multiple(products, HAS_BFLOAT16=True, MIN_MULTIPLICATIONS=0):
        report = check_kernel(reference("decay", Paradigm.CHUNKWISE), checks=checks, examples=30)
    assert report.passed, report


@pytest.mark.parametrize(
    ("able", "dtype", "log_decay", "length", "rounds"),
    [
        (True, torch.bfloat16, "H", 64, True),
        (True, torch.bfloat16, "B T H", 64, True),
        (True, torch.bfloat16, "B T H K", 64, False),
        (True, torch.bfloat16, "H", 16, False),  # few tokens
        (True, torch.float16, "H", 64, False),
        (False, torch.bfloat16, "H", 64, False),
    ],
)
def test_bfloat16_products_are_used_only_where_faster(able, dtype, log_decay, length, rounds):
    case = case_of(log_decay, [length], key_width=48, value_width=48, chunk_size=64, strength=0.05, dtype=dtype)
    inputs = case.inputs(CPU)
    with mock.patch.object(products, "HAS_BFLOAT16", able):
        found = differentiate(case, Paradigm.CHUNKWISE, inputs)
    exact = differentiate(case, Paradigm.RECURRENT, inputs, wide=True)
    assert found["final state"].dtype == torch.float32
    assert (relative_error(found["final state"], exact["final state"]) > 1e-4) == rounds
    for name, x in found.items():
        assert relative_error(x, exact[name]) <= 5e-3, name


@pytest.mark.parametrize("log_decay", DECAYS[1:])
@every_paradigm
def test_reset_at_every_token_matches_the_definition(paradigm, log_decay):
    for has_state in (False, True):
        case = case_of(log_decay, [9, 9], resets=tuple(range(9)), initial_state=has_state)
        case = replace(case, grad=tuple(name for name in case.grad if has_state or name != "state"))
        reproduce_kernel("gradients_are_the_definitions", reference("decay", paradigm), case)


@pytest.mark.parametrize(("paradigm", "length"), [(Paradigm.PARALLEL, 5), (Paradigm.RECURRENT, 1)])
def test_forward_mode_matches_the_definition(paradigm, length):
    case = case_of("H", [length])
    inputs = case.inputs(CPU)
    for name, x in inputs.items():
        functions = (
            lambda x, name=name: run(case, paradigm, inputs | {name: x}),
            lambda x, name=name: tuple(case.define(inputs | {name: x}).values()),
        )
        found, expected = (torch.func.jvp(function, (x,), (torch.ones_like(x),))[1] for function in functions)
        exactly(found, expected)


# measured at most 1.2e-6, 4.3e-4, 3.4e-3; what is wide is as exact in all three, but for the parallel paradigm's
# gradient of log_decay, which comes through products of the inputs' dtype
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 6e-4), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("log_decay", DECAYS)
@every_paradigm
def test_low_precision_stays_near_float64_with_float32_states(paradigm, log_decay, dtype, tolerance):
    case = case_of(log_decay, [96], key_width=16, value_width=24, strength=0.05, chunk_size=40, dtype=dtype)
    actual, exact = (differentiate(case, p, wide=w) for p, w in ((paradigm, False), (Paradigm.RECURRENT, True)))
    assert (actual["output"].dtype, actual["final state"].dtype) == (dtype, torch.float32)
    wide = {"final state", "state"} | ({"log_decay"} if paradigm in OPS else set())
    for name in actual:
        assert relative_error(actual[name], exact[name]) <= (2e-6 if name in wide else tolerance), name
    for length in (1, 40):  # a state to which nothing is added is not rounded
        still = case_of(log_decay, [length], dtype=dtype, strength=0.0).inputs(CPU)
        zeros = {name: torch.zeros_like(x) for name, x in still.items()}
        bit_for_bit(
            run(replace(case, lengths=(length,)), paradigm, zeros | {"state": still["state"]})[1], still["state"]
        )


@pytest.mark.parametrize("log_decay", DECAYS[1:])
@pytest.mark.parametrize(("paradigm", "length"), [*((p, 1024) for p in OPS), (Paradigm.PARALLEL, 512)])
def test_underflowing_decays_give_finite_correct_results(paradigm, length, log_decay):
    sizes = {"n_heads": 1, "key_width": 2, "strength": 3.0, "chunk_size": 128, "dtype": torch.float32}
    case = case_of(log_decay, [length], **sizes)
    inputs = case.inputs(CPU)
    if log_decay != "H":
        inputs["log_decay"][:, length // 2 :] *= 1e30
    actual = differentiate(case, paradigm, inputs)
    expected = differentiate(case, Paradigm.RECURRENT, inputs, wide=True)
    for name, x in actual.items():
        assert x.isfinite().all(), name
        assert relative_error(x, expected[name]) <= 1e-5 or not expected[name].any(), name


@pytest.mark.parametrize("strength", [0.05, 5.0, 20.0])
@pytest.mark.parametrize("log_decay", DECAYS[2:])
@every_paradigm
def test_gradients_of_strong_decays_have_small_relative_error(paradigm, log_decay, strength):
    """The gradients are tiny, but an optimizer that divides by their size still depends on their accuracy."""
    case = case_of(log_decay, [128], key_width=16, value_width=24, chunk_size=48, dtype=torch.float32)
    inputs = case.inputs(CPU)
    inputs["log_decay"] = -strength * (0.9 + 0.2 * torch.sigmoid(inputs["log_decay"]))
    actual, expected = (
        differentiate(case, p, inputs, names=["log_decay"], wide=w)["log_decay"]
        for p, w in ((paradigm, False), (Paradigm.RECURRENT, True))
    )
    errors = (actual - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)
    assert errors.max() <= 2e-5  # of each token; measured at most 3.5e-6


@pytest.mark.parametrize(("length", "chunk_size"), [(1, 4), (4, 4), (11, 4), (12, 4), (3, 8)])
@pytest.mark.parametrize("context", [0, 5])
@every_paradigm
def test_declared_flops_match_counted_flops(paradigm, context, length, chunk_size):
    sizes = {"n_heads": 3, "key_width": 4, "value_width": 6, "initial_state": bool(context), "final_state": False}
    case = case_of("H", [length], chunk_size=chunk_size, **sizes)
    counted = count_flops(lambda: run(case, paradigm, case.inputs(CPU)))
    # outer products are matrix products, done as elementwise ones
    outer = length * 2 * 4 * 6 if paradigm is Paradigm.RECURRENT else 0
    expected = decay_flops(paradigm, length, 4, 6, chunk_size=chunk_size, context=context)
    assert counted == 3 * (expected - outer)


@pytest.mark.parametrize("log_decay", DECAYS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("paradigm", OPS)
def test_states_saved_for_backward_grow_linearly_and_only_if_needed(paradigm, packed, log_decay):
    for names, grad_mode, saved in [((), True, False), (INPUTS, False, False), (["state"], True, True)]:
        sizes = []
        for length in (256, 512, 768):
            case = case_of(log_decay, [length // 2] * 2 if packed else [length], packed=packed, chunk_size=16)
            with torch.set_grad_enabled(grad_mode), Watched() as watched:
                run(case, paradigm, {name: x.requires_grad_(name in names) for name, x in case.inputs(CPU).items()})
            ((_, _, states),) = [results for op, results in watched.seen if op.namespace == "seqmix"]
            sizes.append(states.numel())
        assert bool(sizes[0]) is saved
        assert sizes[2] - sizes[1] == sizes[1] - sizes[0]


Q, K, V = torch.randn(2, 6, 2, 4), torch.randn(2, 6, 2, 4), torch.randn(2, 6, 2, 3)
STATE, BOUNDARIES = torch.zeros(1, 2, 4, 3), torch.tensor([0, 2, 6])


@pytest.mark.parametrize(
    ("tensors", "options", "named"),
    [
        ((Q[0], K[0], V[0]), {}, r"\[6, 2, 4\], \[6, 2, 4\], \[6, 2, 3\]"),
        ((Q, K[..., :3], V), {}, r"\[2, 6, 2, 4\], \[2, 6, 2, 3\]"),
        ((Q, K, V[:, :5]), {}, r"\[2, 5, 2, 3\]"),
        ((Q, K, V[:, :, :1]), {}, r"\[2, 6, 1, 3\]"),
        ((Q[:, :0], K[:, :0], V[:, :0]), {}, "T >= 1"),
        ((Q, K, V, torch.zeros(3)), {}, r"log_decay .* 2, 6, 2, 4.* \[3\]"),
        ((Q, K, V, torch.zeros(6, 2)), {}, r"log_decay .* \[6, 2\]"),
        ((Q, K, V, torch.zeros(1, 6, 2)), {}, r"log_decay .* \[1, 6, 2\]"),
        ((Q, K, V, torch.zeros(2, 6, 2, 3)), {}, r"log_decay .* \[2, 6, 2, 3\]"),
        ((Q, K, V), {"cu_seqlens": torch.tensor([0, 6])}, "B = 1.* 2"),
        ((Q, K, V), {"initial_state": STATE}, r"\[2, 2, 4, 3\].* \[1, 2, 4, 3\]"),
        ((Q, K, V), {"initial_state": torch.zeros(2, 2, 3, 4)}, r"\[2, 2, 4, 3\].* \[2, 2, 3, 4\]"),
        ((Q[:1], K[:1], V[:1]), {"initial_state": STATE, "cu_seqlens": BOUNDARIES}, r"\[2, 2, 4, 3\].* \[1, 2, 4, 3\]"),
        ((Q, K, V), {"chunk_size": 0}, "chunk_size .* 0"),
        ((Q, K, V), {"paradigm": "chunckwise"}, "chunckwise.*chunkwise"),
    ],
)
def test_mismatched_arguments_raise(tensors, options, named):
    with pytest.raises(SeqmixError, match=named) as error:
        decay(*tensors, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("boundaries", [[0, 4], [1, 6], [0, 4, 3, 6]])
def test_invalid_boundaries_raise_in_compiled_code(boundaries):
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 1, 6, 2, 4)
    function = torch.compile(decay, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        function(q, k, v, None, cu_seqlens=torch.tensor(boundaries), paradigm="parallel")


@pytest.mark.parametrize("widths", [(1, 6), (4, 6), (4, 1), (1, 1)])
@pytest.mark.parametrize("heads", [1, 2])
def test_step_keeps_the_strides_of_the_state(heads, widths):
    """`torch.compile` treats a different stride as a different input, even along an axis of size one."""
    q, k, v = (torch.randn(2, 1, heads, width) for width in (widths[0], *widths))
    state = torch.randn(2, heads, *widths)
    for log_decay in (None, torch.full((heads,), -0.1), torch.full((2, 1, heads), -0.1)):
        _, after = decay(q, k, v, log_decay, initial_state=state, output_final_state=True, paradigm="recurrent")
        assert after.stride() == state.stride()
