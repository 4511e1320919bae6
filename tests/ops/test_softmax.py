"""Softmax attention beyond its kernel checks (test_kernels.py): in-place caches, range, precision, compilation."""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from seqmix.ops.attention import softmax_attention, softmax_flops
from seqmix.ops.attention.kv_cache import GrowingCache, RingCache, empty_cache
from seqmix.ops.runtime.paradigm import Paradigm
from seqmix.registry import SeqmixError
from seqmix.testing.counting import count_flops

PARADIGMS = list(Paradigm)
every_paradigm = pytest.mark.parametrize("paradigm", PARADIGMS)
exactly = partial(assert_close, rtol=1e-9, atol=1e-9)
bit_for_bit = partial(assert_close, rtol=0, atol=0)


def clone(state):
    return type(state)(*(x.clone() for x in state))


def make(batch_size=2, length=6, n_heads=4, n_kv_heads=2, dim=4, dtype=torch.float64, requires_grad=False):
    torch.manual_seed(0)
    return [
        torch.randn(batch_size, length, heads, dim, dtype=dtype, requires_grad=requires_grad)
        for heads in (n_heads, n_kv_heads, n_kv_heads)
    ]


def ring(capacity, batch_size=2, read=0, dtype=torch.float64):
    state = empty_cache(RingCache, batch_size, capacity, (2, 4, 4), torch.empty(0, dtype=dtype))
    return state._replace(length=state.length + read)


@every_paradigm
@pytest.mark.parametrize("length", [1, 3])
def test_ring_cache_is_updated_in_place_without_grad(paradigm, length):
    state = ring(8)
    with torch.no_grad():
        _, final_state = softmax_attention(
            *make(length=length), initial_state=state, output_final_state=True, paradigm=paradigm
        )
    assert final_state.keys is state.keys
    assert final_state.values is state.values
    bit_for_bit(state.length, torch.tensor([0, 0]))


@pytest.mark.parametrize("packed", [False, True])
@every_paradigm
def test_ring_overflow_raises_unless_the_window_fits(paradigm, packed):
    reads = torch.tensor([7, 4] if packed else [4])
    boundaries = torch.tensor([0, 1, 4]) if packed else None
    state = ring(7, batch_size=len(reads))._replace(length=reads)
    options = {"initial_state": state, "output_final_state": True, "cu_seqlens": boundaries, "paradigm": paradigm}
    for window in (None, 8):  # one wider than the ring does not help
        with pytest.raises(RuntimeError, match="fewer tokens"):
            softmax_attention(*make(batch_size=1, length=4), window=window, **options)
    softmax_attention(*make(batch_size=1, length=4), window=7, **options)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"window": 0}, "window of 0"),
        ({"chunk_size": 0}, "chunk_size .* 1"),
        ({"log_decay": torch.zeros(3)}, r"log_decay .*\[4\].* \[3\]"),
        ({"initial_state": ring(8, batch_size=3)}, "2 rows"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "B = 1.* 2"),
        ({"k": torch.zeros(2, 6, 3, 4).double(), "v": torch.zeros(2, 6, 3, 4).double()}, "divide"),
        ({"v": torch.zeros(2, 6, 4, 4).double()}, "divide"),
        ({"v": torch.zeros(2, 5, 2, 4).double()}, r"\[2, 6, 4, 4\], \[2, 6, 2, 4\], \[2, 5, 2, 4\]"),
    ],
)
def test_mismatched_arguments_raise(change, named):
    with pytest.raises(SeqmixError, match=named):
        softmax_attention(**dict(zip("qkv", make(), strict=True)) | change)


def test_ring_without_slots_raises():
    with pytest.raises(SeqmixError, match="1 token"):
        ring(0)


@pytest.mark.parametrize("paradigm", [Paradigm.PARALLEL, Paradigm.RECURRENT])
def test_decay_that_overflows_the_dtype_raises(paradigm):
    with pytest.raises(RuntimeError, match="chunk_size"):
        softmax_attention(*make(length=400, dtype=torch.float32), log_decay=torch.full((4,), -0.5), paradigm=paradigm)


def exact(inputs, **options):
    return softmax_attention(*(x.double() for x in inputs), **options)[0]


@pytest.mark.parametrize("packed", [False, True])
def test_chunking_keeps_decay_factors_in_range(packed):
    inputs, cache = make(batch_size=1, length=400, dtype=torch.float32), ring(410, 1 + packed, 7, torch.float32)
    # the second document's cache lies far before the first block
    boundaries = torch.tensor([0, 380, 400]) if packed else None
    options = {"log_decay": torch.full((4,), -0.5), "initial_state": cache, "cu_seqlens": boundaries}
    options |= {"paradigm": Paradigm.CHUNKWISE}
    output, _ = softmax_attention(*inputs, chunk_size=32, **options)
    assert_close(output.double(), exact(inputs, chunk_size=400, **options), rtol=1e-5, atol=1e-5)


@every_paradigm
def test_strongest_allowed_decay_is_accurate(paradigm):
    inputs = make(length=64, dtype=torch.float16)
    log_decay = torch.full((4,), -0.99 * math.log(torch.finfo(torch.float16).max) / 64)
    output, _ = softmax_attention(*inputs, log_decay=log_decay, paradigm=paradigm)
    assert_close(output.double(), exact(inputs, log_decay=log_decay, paradigm="parallel"), rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("chunk_size", [4, 64])
def test_decayed_cache_of_a_million_keys_gives_finite_output(chunk_size):
    past = torch.randn(1, 1_000_000, 1, 2)
    state = GrowingCache(past, past, torch.tensor([999_990]))
    log_decay = torch.tensor([-1.2528, -0.1]) / 512
    q, k, v = (torch.randn(1, 9, 1, 2) for _ in range(3))
    options = {"log_decay": log_decay, "initial_state": state, "chunk_size": chunk_size}
    outputs = [softmax_attention(q, k, v, paradigm=paradigm, **options)[0] for paradigm in PARADIGMS]
    assert torch.isfinite(outputs[0]).all()
    for output in outputs[1:]:
        assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)


@every_paradigm
@pytest.mark.parametrize("decayed", [False, True])
def test_cache_keeps_its_dtype(paradigm, decayed):
    q, k, v = make(length=4, dtype=torch.bfloat16)
    log_decay = torch.linspace(-0.05, 0, 4) if decayed else None
    for state in (ring(9, dtype=torch.float32), GrowingCache(*ring(3, dtype=torch.float32))):
        output, final_state = softmax_attention(
            q, k, v, log_decay=log_decay, initial_state=state, output_final_state=True, paradigm=paradigm
        )
        assert output.dtype == torch.bfloat16
        assert final_state.keys.dtype == final_state.values.dtype == torch.float32


def test_chunkwise_backward_memory_is_linear():
    def saved_bytes(length):
        q, k, v = make(batch_size=1, length=length, requires_grad=True)
        seen = {}

        def pack(x):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            softmax_attention(
                q, k, v, log_decay=torch.linspace(-0.01, 0, 4), chunk_size=32, paradigm=Paradigm.CHUNKWISE
            )
        return sum(seen.values())

    assert saved_bytes(1024) <= 2.1 * saved_bytes(512)


@every_paradigm
@pytest.mark.parametrize(("window", "context"), [(None, 0), (None, 5), (4, 0), (4, 9), (1, 3), (30, 40)])
@pytest.mark.parametrize("length", [1, 11])
def test_declared_flops_match_counted_flops(paradigm, window, context, length):
    q, k, v = make(batch_size=1, length=length)
    state = None
    if context:
        state = ring(context if window is None else window, batch_size=1, read=context)
        state = GrowingCache(*state) if window is None else state
    options = {"window": window, "chunk_size": 3}
    call = partial(softmax_attention, q, k, v, initial_state=state, output_final_state=True, paradigm=paradigm)
    expected = 4 * softmax_flops(paradigm, length, 4, 4, context=context, **options)
    assert count_flops(partial(call, **options)) == expected


@every_paradigm
@pytest.mark.parametrize("context", [0, 5])
def test_flops_of_packed_documents_equal_their_sum(paradigm, context):
    lengths = (5, 0, 3, 8)
    state = GrowingCache(*ring(context, batch_size=4, read=context)) if context else None
    options = {"cu_seqlens": torch.tensor([0, 5, 5, 8, 16]), "initial_state": state, "chunk_size": 3}
    call = partial(softmax_attention, *make(batch_size=1, length=16), paradigm=paradigm, **options)
    one = partial(softmax_flops, paradigm, key_dim=4, value_dim=4, chunk_size=3, context=context)
    assert count_flops(call) == 4 * sum(one(length) for length in lengths if length)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["growing", "window", "packed"])
@every_paradigm
def test_softmax_attention_compiles_into_one_graph_with_equal_gradients(paradigm, case):
    q, k, v = make(batch_size=1 if case == "packed" else 2, length=6, requires_grad=True)
    options = {"output_final_state": True, "chunk_size": 4, "log_decay": torch.linspace(-0.1, 0, 4).double()}
    options |= {
        "growing": {"initial_state": GrowingCache(*ring(3, read=2))},
        "window": {"initial_state": ring(3, read=5), "window": 3},
        "packed": {"initial_state": ring(9, read=2), "cu_seqlens": torch.tensor([0, 2, 6])},
    }[case]
    torch._dynamo.reset()
    compiled = torch.compile(softmax_attention, fullgraph=True, backend="aot_eager")
    results = []
    for function in (softmax_attention, compiled):
        output, state = function(q, k, v, **options, paradigm=paradigm)
        results.append((output, *state, *torch.autograd.grad(output.square().sum() + state.keys.sum(), (q, k, v))))
    exactly(*results)
    assert type(state) is (GrowingCache if case == "growing" else RingCache)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["fresh", "growing", "packed"])
@pytest.mark.parametrize("paradigm", [Paradigm.PARALLEL, Paradigm.RECURRENT])
def test_different_lengths_share_a_graph(paradigm, case, counter):
    compiled = torch.compile(softmax_attention, fullgraph=True, backend=counter)
    for length in (33, 40, 43):
        q, k, v = make(batch_size=1, length=length)
        options = {"log_decay": torch.linspace(-0.01, 0, 4), "output_final_state": True}
        if case == "packed":
            options["cu_seqlens"] = torch.tensor([0, 5, length])
        if case == "growing":
            options["initial_state"] = GrowingCache(*ring(length // 3, batch_size=1))
        exactly(*(function(q, k, v, **options, paradigm=paradigm)[0] for function in (compiled, softmax_attention)))
    # one for the first length, one for any
    assert counter.frame_count == 2


def test_full_ring_raises_in_compiled_code(counter):
    step = partial(softmax_attention, output_final_state=True, paradigm="recurrent")
    compiled, state, token = torch.compile(step, fullgraph=True, backend=counter), ring(2), make(length=1)
    with torch.no_grad():
        for _ in range(2):
            _, state = compiled(*token, initial_state=state)
        with pytest.raises(RuntimeError, match="fewer tokens"):
            compiled(*token, initial_state=state)
    assert counter.frame_count == 1
