"""`decay_reading_values`, whose queries read the state along its values, against a token-by-token definition."""

import itertools
from functools import partial

import pytest
import torch
from recorded_operations import Watched
from torch.testing import assert_close

from seqmix.ops.decay import decay_reading_values
from seqmix.ops.kernels.native import build
from seqmix.registry import SeqmixError
from seqmix.testing.counting import count_flops

PARADIGMS = ["parallel", "recurrent", "chunkwise"]
native = pytest.param("native", marks=pytest.mark.skipif(build.failure("recurrence") is not None, reason="no compiler"))
exactly = partial(assert_close, rtol=1e-9, atol=1e-9)


def inputs_of(lengths, heads=2, key_width=5, value_width=3, *, strength=1.0, resets=(), packed=False, seed=0):
    """Queries, keys, values, log-decays and initial states, in float64."""
    random = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows, length = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    q, v = random(2, rows, length, heads, value_width).unbind()
    k = random(rows, length, heads, key_width)
    log_decay = -strength * random(rows, length, heads, key_width).abs()
    log_decay[:, list(resets)] = -torch.inf
    log_decay[:, length // 2, :, 0] = -torch.inf  # a reset of one key alone
    return q, k, v, log_decay, random(len(lengths), heads, key_width, value_width)


def define(q, k, v, log_decay, states, lengths, packed, scale=0.7):
    """o_t = scale S_t q_t with S_t = diag(exp(a_t)) S_{t-1} + k_t v_t^T: outputs and final states."""
    bounds = [0, *itertools.accumulate(lengths)]
    rows = [slice(*pair) for pair in itertools.pairwise(bounds)] if packed else [slice(None)] * len(lengths)
    outputs, final = [], []
    for n, tokens in enumerate(rows):
        row, state, read = 0 if packed else n, states[n], []
        for query, key, value, a in zip(*(x[row, tokens] for x in (q, k, v, log_decay)), strict=True):
            state = a.exp()[..., None] * state + key[..., None] * value[:, None]
            read.append(scale * torch.einsum("hkv,hv->hk", state, query))
        outputs.append(torch.stack(read) if read else k.new_zeros(0, *k.shape[2:]))
        final.append(state)
    return torch.cat(outputs)[None] if packed else torch.stack(outputs), torch.stack(final)


def differentiate(function, tensors):
    """Output, final state and all gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    results = function(*leaves)
    random = partial(torch.randn, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return *results, *torch.autograd.grad(results, leaves, [random(x.shape).to(x) for x in results])


def call(q, k, v, log_decay, states, lengths, packed, **options):
    if packed:
        options["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)])
    return tuple(
        decay_reading_values(q, k, v, log_decay, initial_state=states, output_final_state=True, scale=0.7, **options)
    )


@pytest.mark.parametrize("resets", [(), (0,), (4, 5), range(9)], ids=str)
@pytest.mark.parametrize("strength", [0.0, 1.0, 50.0])
@pytest.mark.parametrize(("lengths", "packed"), [([9, 9], False), ([4, 0, 6, 1], True), ([70], False)], ids=str)
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_output_state_and_gradients_match_the_definition(paradigm, lengths, packed, strength, resets):
    tensors = inputs_of(lengths, strength=strength, resets=resets, packed=packed)
    options = {"lengths": lengths, "packed": packed}
    found = differentiate(
        partial(call, **options, paradigm=paradigm, chunk_size=4 if len(lengths) > 1 else 48), tensors
    )
    exactly(found, differentiate(partial(define, **options), tensors))


# measured at most 3e-7 and 5e-3
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("strength", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("widths", [(64, 64), (33, 18), (5, 7)], ids=str)
@pytest.mark.parametrize(("lengths", "packed"), [([130, 130], False), ([63, 0, 65, 1], True)], ids=str)
@pytest.mark.parametrize("backend", ["reference", native])
def test_low_precision_stays_near_the_definition(backend, lengths, packed, widths, strength, dtype, tolerance):
    *qkv, log_decay, states = inputs_of(lengths, 2, *widths, strength=strength, resets=(20,), packed=packed)
    narrow = [*(x.to(dtype) for x in qkv), log_decay.float(), states.float()]
    options = {"lengths": lengths, "packed": packed}
    found = differentiate(partial(call, **options, backend=backend, chunk_size=64), narrow)
    exact = differentiate(partial(define, **options), [x.double() for x in narrow])
    assert [x.dtype for x in found] == [dtype, torch.float32, *[dtype] * 3, torch.float32, torch.float32]
    for x, y in zip(found, exact, strict=True):
        assert (x.double() - y).norm() <= tolerance * y.norm()


@pytest.mark.parametrize("only", range(5))
@pytest.mark.parametrize("of", [0, 1])
@pytest.mark.parametrize("backend", ["reference", native])
def test_each_gradient_of_each_result_is_correct_alone(backend, of, only):
    dtype = torch.float64 if backend == "reference" else torch.float32
    tensors = [x.to(dtype) for x in inputs_of([11, 11])]
    options = {"lengths": [11, 11], "packed": False}

    def gradient(function):
        leaves = [x.clone().requires_grad_(n == only) for n, x in enumerate(tensors)]
        result = function(*leaves)[of]
        return torch.autograd.grad(result.sum(), leaves[only], materialize_grads=True)[0] if result.requires_grad else 0

    found, expected = (
        gradient(partial(call, **options, backend=backend, chunk_size=4)),
        gradient(partial(define, **options)),
    )
    assert_close(found, torch.as_tensor(expected).to(dtype).expand_as(found), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", native])
def test_omitted_state_equals_a_state_of_zeros(backend):
    q, k, v, log_decay, states = (x.float() for x in inputs_of([70, 70]))
    found = decay_reading_values(q, k, v, log_decay, backend=backend, chunk_size=16)
    assert found.final_state is None
    zeros = torch.zeros_like(states)
    assert_close(
        found.output,
        decay_reading_values(q, k, v, log_decay, backend=backend, initial_state=zeros, chunk_size=16).output,
    )


@pytest.mark.parametrize("backend", ["triton", "fla"])
def test_backends_without_a_kernel_run_the_reference(backend):
    q, k, v, log_decay, _ = inputs_of([9, 9])
    with Watched() as watched:
        decay_reading_values(q, k, v, log_decay, backend=backend)
    assert [op.name() for op, _ in watched.seen if op.namespace == "seqmix"] == ["seqmix::decay_chunkwise"]


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 9, 64])
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_op_compiles_into_one_graph_with_equal_gradients(paradigm, length):
    torch._dynamo.reset()
    tensors, options = inputs_of([length, length]), {"lengths": [length, length], "packed": False, "paradigm": paradigm}
    compiled = torch.compile(partial(call, **options), fullgraph=True, backend="aot_eager")
    exactly(differentiate(compiled, tensors), differentiate(partial(call, **options), tensors))


def test_flops_are_linear_in_tokens():
    costs = []
    for length in (256, 512, 768):
        q, k, v, log_decay, _ = inputs_of([length])
        costs.append(count_flops(lambda tensors=(q, k, v, log_decay): decay_reading_values(*tensors, chunk_size=16)))
    assert costs[2] - costs[1] == costs[1] - costs[0] > 0


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_mismatched_arguments_raise(paradigm):
    q, k, v, log_decay, states = inputs_of([9, 9])
    for tensors in ((q[..., :2], k, v, log_decay), (q, k[:, :, :1], v, log_decay), (q, k, v, log_decay[..., :3])):
        with pytest.raises(SeqmixError, match="expected") as error:
            decay_reading_values(*tensors, paradigm=paradigm)
        assert "\n" not in str(error.value)
    with pytest.raises(SeqmixError, match="initial state"):
        decay_reading_values(q, k, v, log_decay, initial_state=states.mT, paradigm="chunkwise")
