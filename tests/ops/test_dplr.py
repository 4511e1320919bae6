"""The general form of the delta family beyond its kernel checks (test_kernels.py): b, delta products, flops, errors."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from recurrence_calls import CPU, case_of, differentiate, run
from torch.testing import assert_close

from seqmix.ops.delta import delta_flops, delta_product
from seqmix.ops.dplr import dplr
from seqmix.ops.runtime.call import Call
from seqmix.ops.runtime.paradigm import Paradigm
from seqmix.registry import SeqmixError
from seqmix.testing.counting import count_flops
from seqmix.testing.kernel.families import DeltaCase, DplrCase

PARADIGMS = [Paradigm.RECURRENT, Paradigm.CHUNKWISE]
every_paradigm = pytest.mark.parametrize("paradigm", PARADIGMS)
every_decay = pytest.mark.parametrize("log_decay", [None, "H", "B T H", "B T H K"])
exactly = partial(assert_close, rtol=1e-9, atol=1e-9)


@every_paradigm
@every_decay
@pytest.mark.parametrize("lengths", [[30, 30], [9, 0, 1, 20], [1, 1]], ids=str)
def test_omitted_b_defaults_to_minus_k(paradigm, log_decay, lengths):
    case = case_of(log_decay, lengths, kind=DplrCase, packed=len(lengths) > 2, strength=0.3, resets=(5,))
    given = {name: x for name, x in case.inputs(CPU).items() if name != "b"}

    def of_k(q, k, v, a, b, log_decay, **options):
        return dplr(q, k, v, a, -k if b is None else b, log_decay, **options)

    exactly(*(differentiate(case, paradigm, given, function=f) for f in (dplr, of_k)))


def householder_loop(n, q, k, v, beta, log_decay, state, scale):
    """The definition of several steps per token; a row after the other."""
    outputs = []
    a = torch.zeros(q.shape[2]).double() if log_decay is None else log_decay
    a = a.expand(q.shape[:3]) if a.ndim == 1 else a
    a = (a if a.ndim == 4 else a[..., None]).expand(q.shape)
    for t in range(q.shape[1]):
        state = a[:, t, ..., None].exp() * state
        for i in range(t * n, t * n + n):
            error = v[:, i] - torch.einsum("bhk,bhkv->bhv", k[:, i], state)
            state = state + torch.einsum("bh,bhk,bhv->bhkv", beta[:, i], k[:, i], error)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state


@every_paradigm
@every_decay
@pytest.mark.parametrize("n", [1, 2, 3])
def test_delta_product_matches_a_loop_of_n_steps_per_token(paradigm, log_decay, n):
    case = case_of(log_decay, [10, 10], kind=DeltaCase, strength=0.3, rate=2.0)
    inputs = case.inputs(CPU)
    steps = case_of(None, [10 * n, 10 * n], kind=DeltaCase, rate=2.0, seed=1).inputs(CPU)
    names = ("q", "k", "v", "beta", "log_decay", "state")
    given = inputs | {name: steps[name] for name in ("k", "v", "beta")}

    def ours(q, k, v, beta, log_decay, state):
        call = Call.of(paradigm, 10, state, True, chunk_size=7)
        return delta_product(q, k, v, beta, log_decay, call, scale=0.7)

    results = []
    for function in (ours, lambda *given: householder_loop(n, *given, scale=0.7)):
        leaves = {name: given[name].clone().requires_grad_() for name in names if name in given}
        output, state = function(*(leaves.get(name) for name in names))
        loss = (output * output.detach().cos()).sum() + state.square().sum()
        results.append([output, state, *torch.autograd.grad(loss, list(leaves.values()))])
    exactly(*results)


@every_paradigm
@every_decay
def test_packed_delta_product_matches_each_document_alone(paradigm, log_decay):
    boundaries, n = [0, 3, 3, 10], 2
    inputs = case_of(log_decay, [10], kind=DeltaCase, strength=0.3).inputs(CPU)
    steps = case_of(None, [10 * n], kind=DeltaCase, seed=1).inputs(CPU)
    states = torch.randn(3, *inputs["state"].shape[1:], dtype=torch.float64)

    def part(start, stop, state, **options):
        call = Call.of(paradigm, stop - start, state, True, chunk_size=3, **options)
        a = inputs.get("log_decay")
        a = a[:, start:stop] if a is not None and a.ndim > 1 else a
        rest = (steps[name][:, n * start : n * stop] for name in ("k", "v", "beta"))
        return delta_product(inputs["q"][:, start:stop], *rest, a, call)

    output, final = part(0, 10, states, cu_seqlens=torch.tensor(boundaries))
    for row, (start, stop) in enumerate(pairwise(boundaries)):
        if start == stop:
            exactly(final[row], states[row])
            continue
        exactly((output[:, start:stop], final[row : row + 1]), tuple(part(start, stop, states[row : row + 1])))


@pytest.mark.parametrize("kind", [DeltaCase, DplrCase])
@pytest.mark.parametrize("context", [0, 5])
@pytest.mark.parametrize(("length", "chunk_size"), [(13, 5), (12, 4), (3, 8), (1, 4)])
@every_decay
def test_declared_flops_match_counted_flops(kind, context, length, chunk_size, log_decay):
    case = case_of(log_decay, [length], kind=kind, key_width=4, value_width=6, initial_state=context > 0)
    case = type(case)(**vars(case) | {"chunk_size": chunk_size, "grad": (), "final_state": False})
    counted = count_flops(lambda: run(case, Paradigm.CHUNKWISE, case.inputs(CPU)))
    options = {"context": context, "key_decays": log_decay == "B T H K", "n_keys": 1 + (kind is DplrCase)}
    expected = case.n_heads * delta_flops(Paradigm.CHUNKWISE, length, 4, 6, chunk_size=chunk_size, **options)
    # the products of a token's queries with its own keys, where a key dimension decays by itself, are a sum
    assert counted == expected


X, V = torch.randn(2, 6, 2, 4), torch.randn(2, 6, 2, 3)


@pytest.mark.parametrize(
    ("tensors", "options", "named"),
    [
        ((X, X, V, X[..., :3]), {}, r" a \[B T H K\] .* \[2, 6, 2, 4\], got \[2, 6, 2, 3\]"),
        ((X, X, V, X, X.long()), {}, r" b \[B T H K\] .* int64"),
        ((X, X, V, X), {"paradigm": "parallel"}, "parallel .* chunkwise, recurrent"),
    ],
)
def test_mismatched_arguments_raise(tensors, options, named):
    with pytest.raises(SeqmixError, match=named):
        dplr(*tensors, **options)
    with pytest.raises(SeqmixError, match=r"whole number of steps .* 3 keys for 6 tokens"):
        delta_product(X, X[:, :3], V[:, :3], X[:, :3, :, 0], None, Call.of("chunkwise", 6))
