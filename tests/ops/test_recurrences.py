"""Shared tests of the decay, delta and DPLR families beyond their kernel checks (test_kernels.py)."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from recurrence_calls import CPU, OPS, case_of, differentiate, run
from torch.testing import assert_close

from seqmix.ops.runtime.kernel import reference
from seqmix.ops.runtime.paradigm import Paradigm
from seqmix.testing import reproduce_kernel
from seqmix.testing.kernel.families import FAMILIES

exactly = partial(assert_close, rtol=1e-9, atol=1e-9)
REPLACING = [Paradigm.RECURRENT, Paradigm.CHUNKWISE]
PARADIGMS = {"decay": list(Paradigm), "delta": REPLACING, "dplr": REPLACING}
every = pytest.mark.parametrize(("family", "paradigm"), [(name, by) for name in PARADIGMS for by in PARADIGMS[name]])


def calls(*decays):
    """Every paradigm of every family, with the log-decays that they take."""
    found = [(name, by, decay) for name in PARADIGMS for by in PARADIGMS[name] for decay in decays]
    return pytest.mark.parametrize(("family", "paradigm", "log_decay"), found)


def make(family, log_decay, lengths, **fields):
    if family != "decay":
        fields = {"strength": 0.3, "rate": 2.0} | fields  # betas from 0 to 2
    return case_of(log_decay, lengths, kind=FAMILIES[family], packed=len(lengths) > 2, **fields)


def op_of(family):
    return OPS[FAMILIES[family]]


@pytest.mark.slow
@calls(None, "H", "B T H", "B T H K")
@pytest.mark.parametrize("lengths", [[130, 130], [63, 0, 70]], ids=str)
def test_gradients_match_definition_beyond_one_block_of_saved_states(family, paradigm, log_decay, lengths):
    sizes = {"strength": 0.1} if family == "decay" else {"n_heads": 1}
    case = make(family, log_decay, lengths, chunk_size=48, **sizes)
    reproduce_kernel("gradients_are_the_definitions", reference(family, paradigm), case)


@pytest.mark.parametrize("family", PARADIGMS)
@pytest.mark.parametrize(("paradigm", "length"), [(Paradigm.CHUNKWISE, 4), (Paradigm.RECURRENT, 64)])
@pytest.mark.parametrize("carried", [False, True])
def test_short_documents_save_no_more_states_than_one_long_document(family, paradigm, length, carried):
    """Counts the elements saved for backward with B = 1, H = 1, K = 4 and V = 6."""

    def saved(lengths):
        case = make(
            family, "B T H", lengths, n_heads=1, key_width=4, value_width=6, chunk_size=4, initial_state=carried
        )
        case, sizes = replace(case, packed=True), []
        inputs = {name: x.requires_grad_() for name, x in case.inputs(CPU).items()}
        mine = {x.data_ptr() for x in inputs.values()}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x) or x, lambda x: x):
            run(case, paradigm, inputs)
        return sum(x.numel() for x in sizes if x.is_floating_point() and x.data_ptr() not in mine)

    assert saved([length] * 8) <= saved([8 * length])


@every
def test_worked_example_matches_hand_computed_values(family, paradigm):
    """gamma = 1/2, and the state starts at 4. The delta rule with beta = 1/2 writes half of its error; DPLR does so
    with b = -k/2 and half of each value."""
    steps = {
        "decay": ([1, 1, 2], [1, 2, 1], [1, 1, 3], [3, 3.5, 9.5], 4.75),  # 4/2 + 1, 3/2 + 2, 3.5/2 + 3
        "delta": ([1, 2], [1, 1], [3, 1], [2.5, 2.25], 1.125),  # 4/2 + (3 - 2)/2, 2.5/2 + (1 - 1.25)/2
        "dplr": ([1, 2], [1, 1], [1.5, 0.5], [2.5, 2.25], 1.125),
    }
    *qkv, expected, last = steps[family]
    q, k, v = (torch.tensor(x, dtype=torch.float64).reshape(1, -1, 1, 1) for x in qkv)
    options = {"initial_state": torch.full((1, 1, 1, 1), 4.0, dtype=torch.float64), "output_final_state": True}
    options |= {"delta": {"beta": torch.full((1, 2, 1), 0.5)}, "dplr": {"a": k, "b": -k / 2}}.get(family, {})
    log_decay = torch.tensor([-math.log(2)], dtype=torch.float64)
    output, final = op_of(family)(q, k, v, log_decay=log_decay, paradigm=paradigm, **options)
    exactly(output.flatten(), torch.tensor(expected, dtype=torch.float64))
    exactly(final.item(), last)


@calls("B T H", "B T H K")
@pytest.mark.parametrize("reset", [0, 3, 4, 15, 16, 19])
def test_reset_erases_all_influence_of_earlier_tokens(family, paradigm, log_decay, reset):
    case = make(family, log_decay, [20, 20], resets=(reset,), chunk_size=20 if reset > 8 else 4)
    inputs = {name: x.requires_grad_() for name, x in case.inputs(CPU).items()}
    output, state = run(case, paradigm, inputs)
    later = {name: x[:, reset:] for name, x in inputs.items() if name != "state"}
    exactly((output[:, reset:], state), run(case, paradigm, later))
    gradients = torch.autograd.grad(output[:, reset:].sum() + state.sum(), list(inputs.values()))
    for name, gradient in zip(inputs, gradients, strict=True):
        before = gradient if name == "state" else gradient[:, : reset + (name == "log_decay")]
        exactly(before, torch.zeros_like(before))


@pytest.mark.parametrize("length", [1, 9])
@calls(None, "H", "B T H", "B T H K")
def test_results_and_gradients_are_the_same_under_autocast(family, paradigm, log_decay, length):
    case = make(family, log_decay, [length], dtype=torch.float32)
    autocast = torch.autocast("cpu", torch.bfloat16)(op_of(family))
    assert_close(differentiate(case, paradigm, function=autocast), differentiate(case, paradigm), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[9, 9], [4, 0, 5]], ids=str)
@calls("H", "B T H K", "B T H")
def test_recurrence_compiles_into_one_graph_with_equal_gradients(family, paradigm, log_decay, lengths):
    torch._dynamo.reset()
    case = make(family, log_decay, lengths)
    compiled = torch.compile(op_of(family), fullgraph=True, backend="aot_eager")
    exactly(differentiate(case, paradigm, function=compiled), differentiate(case, paradigm))


@pytest.mark.slow
@every
def test_new_data_and_sizes_do_not_recompile(family, paradigm, counter):
    compiled = torch.compile(op_of(family), fullgraph=True, backend=counter)

    def compare(function, lengths, seed=0):
        case = make(family, "B T H", lengths, resets=(seed,), seed=seed)
        inputs = case.inputs(CPU)
        exactly(run(case, paradigm, inputs, function), run(case, paradigm, inputs))

    for seed, lengths in enumerate([[4, 5, 3], [0, 12, 0], [12, 0, 0]]):
        compare(compiled, lengths, seed)
    assert counter.frame_count == 1
    for length in (13, 20):
        compare(compiled, [0, 1, length])
    assert counter.frame_count == 2
    # no two of the sizes are equal, which a compiler would take for one
    dynamic = torch.compile(op_of(family), fullgraph=True, backend=counter, dynamic=True)
    for documents in (6, 7, 8):
        compare(dynamic, [1] * (documents - 1) + [25 - documents])
    assert counter.frame_count == 3
