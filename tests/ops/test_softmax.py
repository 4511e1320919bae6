"""Softmax attention against a definition in Python lists, in every paradigm, from every state, packed or not."""

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from seqmix.ops.paradigm import Paradigm
from seqmix.ops.softmax import softmax_attention, softmax_flops
from seqmix.ops.softmax.cache import GrowingCache, RingCache, empty_cache
from seqmix.registry import SeqmixError

PARADIGMS = list(Paradigm)
KINDS = [None, GrowingCache, RingCache]
exactly = partial(assert_close, rtol=1e-9, atol=1e-9)
bit_for_bit = partial(assert_close, rtol=0, atol=0)


@dataclass(frozen=True)
class Case:
    """Everything that a map can be asked; sequences are rows of a batch or packed documents."""

    kind: type | None
    packed: bool
    lengths: list[int]
    reads: list[int]
    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    decayed: bool
    capacity: int
    chunk_size: int
    seed: int

    @property
    def borders(self):
        return torch.tensor([0, *itertools.accumulate(self.lengths)]) if self.packed else None

    def random(self):
        generator = torch.Generator().manual_seed(self.seed)
        return partial(torch.randn, generator=generator, dtype=torch.float64)

    def tensors(self):
        """q, k, v of the segment, and the keys and values read before, a list a sequence."""
        randn = self.random()
        shape = (1, sum(self.lengths)) if self.packed else (len(self.lengths), self.lengths[0])
        q = randn(*shape, self.n_heads, self.key_dim)
        k = randn(*shape, self.n_kv_heads, self.key_dim)
        v = randn(*shape, self.n_kv_heads, self.value_dim)
        past = [
            (randn(read, self.n_kv_heads, self.key_dim), randn(read, self.n_kv_heads, self.value_dim))
            for read in self.reads
        ]
        return q, k, v, past

    @property
    def log_decay(self):
        return -self.random()(self.key_dim).abs() if self.decayed else None

    def options(self, **more):
        return dict(
            window=self.window,
            log_decay=self.log_decay,
            cu_seqlens=self.borders,
            output_final_state=True,
            chunk_size=self.chunk_size,
            **more,
        )

    def sequences(self, x):
        """A segment's tensor as one tensor a sequence."""
        return x[0].split(self.lengths) if self.packed else list(x)

    def segment(self, sequences):
        return torch.cat(sequences)[None] if self.packed else torch.stack(sequences)


@st.composite
def cases(draw, kinds=tuple(KINDS), packings=(False, True)):
    kind, packed = draw(st.sampled_from(kinds)), draw(st.sampled_from(packings))
    n = draw(st.integers(1, 3))
    if packed:
        lengths = draw(st.lists(st.integers(0, 5), min_size=n, max_size=n).filter(sum))
    else:
        lengths = [draw(st.integers(1, 7))] * n
    reads = [0] * n if kind is None else draw(st.lists(st.integers(0, 7), min_size=n, max_size=n))
    window = draw(st.none() | st.integers(1, 9))
    longest = max(a + b for a, b in zip(lengths, reads, strict=True))
    if kind is RingCache:
        enough = longest if window is None else min(window, longest)
        capacity = max(1, enough) + draw(st.integers(0, 3))
    else:
        capacity = max(reads) + (0 if kind is None else draw(st.integers(0, 2)))
    n_kv_heads = draw(st.integers(1, 2))
    return Case(
        kind=kind,
        packed=packed,
        lengths=lengths,
        reads=reads,
        n_heads=n_kv_heads * draw(st.integers(1, 2)),
        n_kv_heads=n_kv_heads,
        key_dim=draw(st.integers(1, 3)),
        value_dim=draw(st.integers(1, 3)),
        window=window,
        decayed=draw(st.booleans()),
        capacity=capacity,
        chunk_size=draw(st.integers(1, 8)),
        seed=draw(st.integers(0, 2**32)),
    )


def define(q, k, v, window, log_decay):
    """o of one sequence by the definition; q holds the last queries only, k and v all tokens."""
    group = q.shape[1] // k.shape[1]
    first = len(k) - len(q)
    rows = []
    for t, h in itertools.product(range(len(q)), range(q.shape[1])):
        n = first + t
        seen = range(0 if window is None else max(0, n - window + 1), n + 1)
        weights = []
        for m in seen:
            products = q[t, h] * k[m, h // group]
            if log_decay is not None:
                products = products * (log_decay * (n - m)).exp()
            weights.append((products.sum() / math.sqrt(q.shape[2])).exp())
        rows.append(sum(w * v[m, h // group] for w, m in zip(weights, seen, strict=True)) / sum(weights))
    return torch.stack(rows).reshape(len(q), q.shape[1], v.shape[2]) if rows else v.new_zeros(0, q.shape[1], v.shape[2])


def place(kind, tokens, capacity):
    """Tokens [L ...] of one sequence in the slots of a cache [S ...]."""
    slots = [torch.zeros_like(tokens[0]) if len(tokens) else tokens.new_zeros(tokens.shape[1:])] * capacity
    for p in range(len(tokens)):
        if kind is GrowingCache:
            slots[capacity - len(tokens) + p] = tokens[p]
        else:
            slots[p % capacity] = tokens[p]
    return torch.stack(slots) if slots else tokens.new_zeros(0, *tokens.shape[1:])


def cache_of(kind, keys, values, capacity):
    """The cache that holds each sequence's keys and values."""
    return kind(
        torch.stack([place(kind, x, capacity) for x in keys]),
        torch.stack([place(kind, x, capacity) for x in values]),
        torch.tensor([len(x) for x in keys]),
    )


def final_shape(case):
    """Kind and capacity of the final state."""
    kind = case.kind or (GrowingCache if case.window is None else RingCache)
    if kind is GrowingCache:
        return kind, case.capacity + (sum(case.lengths) if case.packed else case.lengths[0])
    return kind, case.window if case.kind is None else case.capacity


def expected(case, q, k, v, past):
    """Output and final state by the definition."""
    keys = [torch.cat((a, b)) for (a, _), b in zip(past, case.sequences(k), strict=True)]
    values = [torch.cat((a, b)) for (_, a), b in zip(past, case.sequences(v), strict=True)]
    outputs = [
        define(a, b, c, case.window, case.log_decay) for a, b, c in zip(case.sequences(q), keys, values, strict=True)
    ]
    kind, capacity = final_shape(case)
    return case.segment(outputs), cache_of(kind, keys, values, capacity)


def initial_state(case, past):
    if case.kind is None:
        return None
    return cache_of(case.kind, [a for a, _ in past], [b for _, b in past], case.capacity)


def clone(state):
    return None if state is None else type(state)(*(x.clone() for x in state))


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("kind", KINDS, ids=["fresh", "growing", "ring"])
@pytest.mark.parametrize("paradigm", PARADIGMS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_output_and_state_are_the_definition(paradigm, kind, packed, data):
    case = data.draw(cases([kind], [packed]))
    q, k, v, past = case.tensors()
    state = initial_state(case, past)
    with torch.set_grad_enabled(data.draw(st.booleans(), label="grad")):
        output, final_state = softmax_attention(q, k, v, initial_state=state, **case.options(), paradigm=paradigm)
    expected_output, expected_state = expected(case, q, k, v, past)
    exactly(output, expected_output)
    assert type(final_state) is type(expected_state)
    for leaf, expected_leaf in zip(final_state, expected_state, strict=True):
        bit_for_bit(leaf, expected_leaf)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("paradigm", PARADIGMS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_gradients_are_those_of_the_definition(paradigm, packed, data):
    case = data.draw(cases(packings=[packed]))
    q, k, v, past = case.tensors()
    state = initial_state(case, past)
    inputs = [q, k, v, *(() if state is None else state[:2])]
    leaves = [x.requires_grad_() for x in inputs]
    tokens = [x.requires_grad_() for pair in past for x in pair]
    expected_output, expected_state = expected(case, q, k, v, past)
    randn = case.random()
    # an empty slot has no token to send its gradient to
    cotangents = [randn(expected_output.shape), *(randn(x.shape) * (x != 0) for x in expected_state[:2])]
    expected_gradients = torch.autograd.grad(
        [expected_output, *expected_state[:2]], [q, k, v, *tokens], cotangents, materialize_grads=True
    )
    output, final_state = softmax_attention(q, k, v, initial_state=state, **case.options(), paradigm=paradigm)
    gradients = torch.autograd.grad([output, *final_state[:2]], leaves, cotangents, materialize_grads=True)
    for gradient, expected_gradient in zip(gradients[:3], expected_gradients[:3], strict=True):
        exactly(gradient, expected_gradient)
    if state is not None:
        # a slot's gradient is that of the token it holds
        by_row = cache_of(case.kind, expected_gradients[3::2], expected_gradients[4::2], case.capacity)
        exactly(gradients[3], by_row.keys)
        exactly(gradients[4], by_row.values)


@pytest.mark.parametrize("first", PARADIGMS)
@pytest.mark.parametrize("second", PARADIGMS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_pieces_equal_the_whole(first, second, data):
    case = data.draw(cases())
    q, k, v, past = case.tensors()
    if case.packed:
        cuts = [data.draw(st.integers(0, length)) for length in case.lengths]
    else:
        cuts = [data.draw(st.integers(0, case.lengths[0]))] * len(case.lengths)
    halves = [
        replace(case, lengths=cuts),
        replace(case, lengths=[a - b for a, b in zip(case.lengths, cuts, strict=True)]),
    ]
    if not all(sum(half.lengths) for half in halves):
        return
    parts = [
        [sequence.split([cut, len(sequence) - cut]) for sequence, cut in zip(case.sequences(x), cuts, strict=True)]
        for x in (q, k, v)
    ]
    state, outputs = initial_state(case, past), []
    with torch.no_grad():
        whole, whole_state = softmax_attention(q, k, v, initial_state=clone(state), **case.options(), paradigm=first)
        for i, paradigm in enumerate((first, second)):
            segment = [halves[i].segment([pieces[i] for pieces in x]) for x in parts]
            output, state = softmax_attention(*segment, initial_state=state, **halves[i].options(), paradigm=paradigm)
            outputs.append(halves[i].sequences(output))
    joined = case.segment([torch.cat(pieces) for pieces in zip(*outputs, strict=True)])
    exactly(joined, whole)
    for leaf, expected_leaf in zip(state, whole_state, strict=True):
        bit_for_bit(leaf, expected_leaf)


@pytest.mark.parametrize("paradigm", PARADIGMS)
@settings(max_examples=25, deadline=None)
@given(case=cases(packings=[False]), seed=st.integers(0, 1000))
def test_the_future_changes_nothing(paradigm, case, seed):
    q, k, v, past = case.tensors()
    state = initial_state(case, past)
    cut = seed % case.lengths[0]
    output, _ = softmax_attention(q, k, v, initial_state=state, **case.options(), paradigm=paradigm)
    for x in (q, k, v):
        x[:, cut + 1 :] = 1e3 * torch.randn_like(x[:, cut + 1 :])
    changed, _ = softmax_attention(q, k, v, initial_state=state, **case.options(), paradigm=paradigm)
    exactly(changed[:, : cut + 1], output[:, : cut + 1])


def make(batch_size=2, length=6, n_heads=4, n_kv_heads=2, dim=4, dtype=torch.float64, requires_grad=False):
    torch.manual_seed(0)
    return [
        torch.randn(batch_size, length, heads, dim, dtype=dtype, requires_grad=requires_grad)
        for heads in (n_heads, n_kv_heads, n_kv_heads)
    ]


def ring(capacity, batch_size=2, read=0, dtype=torch.float64):
    state = empty_cache(RingCache, batch_size, capacity, (2, 4, 4), torch.empty(0, dtype=dtype))
    return state._replace(length=state.length + read)


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("length", [1, 3])
def test_without_grad_a_ring_is_written_in_place(paradigm, length):
    state = ring(8)
    with torch.no_grad():
        _, final_state = softmax_attention(
            *make(length=length), initial_state=state, output_final_state=True, paradigm=paradigm
        )
    assert final_state.keys is state.keys
    assert final_state.values is state.values
    bit_for_bit(state.length, torch.tensor([0, 0]))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_a_state_is_not_written_unless_a_final_one_is_wanted(paradigm, window):
    state = ring(8)
    before = clone(state)
    with torch.no_grad():
        softmax_attention(*make(length=1), initial_state=state, window=window, paradigm=paradigm)
    for leaf, expected_leaf in zip(state, before, strict=True):
        bit_for_bit(leaf, expected_leaf)


@pytest.mark.parametrize("requires_grad", [False, True])
@settings(max_examples=30, deadline=None)
@given(case=cases(KINDS[1:]), paradigm=st.sampled_from(PARADIGMS))
def test_in_grad_mode_a_state_is_never_written(requires_grad, case, paradigm):
    q, k, v, past = case.tensors()
    state = initial_state(case, past)
    before = clone(state)
    versions = [x._version for x in state]
    softmax_attention(q.requires_grad_(requires_grad), k, v, initial_state=state, **case.options(), paradigm=paradigm)
    assert [x._version for x in state] == versions
    for leaf, expected_leaf in zip(state, before, strict=True):
        bit_for_bit(leaf, expected_leaf)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_a_ring_without_window_never_overflows(paradigm, packed):
    q, k, v = make(batch_size=1, length=4)
    borders = torch.tensor([0, 1, 4]) if packed else None
    reads = torch.tensor([7, 4] if packed else [4])
    state = ring(7, batch_size=len(reads))._replace(length=reads)
    options = {"output_final_state": True, "cu_seqlens": borders}
    with pytest.raises(RuntimeError, match="allocated for fewer tokens"):
        softmax_attention(q, k, v, initial_state=state, **options, paradigm=paradigm)
    # a window wider than the ring is no excuse; one that fits is
    with pytest.raises(RuntimeError, match="allocated for fewer tokens"):
        softmax_attention(q, k, v, initial_state=state, window=8, **options, paradigm=paradigm)
    softmax_attention(q, k, v, initial_state=state, window=7, **options, paradigm=paradigm)


@pytest.mark.parametrize("borders", [[0, 5], [1, 6], [0, 4, 2, 6], [0, 7]])
def test_wrong_borders_are_refused(borders):
    with pytest.raises(SeqmixError, match="cu_seqlens must rise from 0 to the 6 tokens given"):
        softmax_attention(*make(batch_size=1), cu_seqlens=torch.tensor(borders), paradigm=Paradigm.PARALLEL)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"window": 0}, "1 is the smallest"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"log_decay": torch.zeros(3)}, r"\[4\], is \[3\]"),
        ({"initial_state": ring(8, batch_size=3)}, "must have 2 rows"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "the batch is 2"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(change, sentence):
    with pytest.raises(SeqmixError, match=sentence):
        softmax_attention(*make(), **change, paradigm=Paradigm.CHUNKWISE)


@pytest.mark.parametrize("heads", [(4, 3, 3), (4, 2, 4)])
def test_heads_that_do_not_group_are_refused(heads):
    q, k, v = (torch.randn(2, 6, n, 4) for n in heads)
    with pytest.raises(SeqmixError, match="must divide"):
        softmax_attention(q, k, v, paradigm=Paradigm.PARALLEL)


def test_a_ring_holds_at_least_a_token():
    with pytest.raises(SeqmixError, match="at least 1 token"):
        ring(0)


@pytest.mark.parametrize("paradigm", [Paradigm.PARALLEL, Paradigm.RECURRENT])
def test_a_decay_whose_factors_leave_the_dtype_is_refused(paradigm):
    with pytest.raises(RuntimeError, match="smaller chunk_size"):
        softmax_attention(*make(length=400, dtype=torch.float32), log_decay=torch.full((4,), -0.5), paradigm=paradigm)


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_keep_the_factors_of_a_decay_in_range(packed):
    q, k, v = make(batch_size=1, length=400, dtype=torch.float32)
    options = {
        "log_decay": torch.full((4,), -0.5),
        "initial_state": ring(410, batch_size=1, read=7, dtype=torch.float32),
    }
    if packed:
        # the second document's cache lies far behind the first block
        options["cu_seqlens"] = torch.tensor([0, 380, 400])
        options["initial_state"] = ring(410, batch_size=2, read=7, dtype=torch.float32)
    output, _ = softmax_attention(q, k, v, chunk_size=32, **options, paradigm=Paradigm.CHUNKWISE)
    exact, _ = softmax_attention(
        q.double(), k.double(), v.double(), chunk_size=400, **options, paradigm=Paradigm.CHUNKWISE
    )
    assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_the_strongest_decay_allowed_is_accurate(paradigm):
    q, k, v = make(length=64, dtype=torch.float16)
    log_decay = torch.full((4,), -0.99 * math.log(torch.finfo(torch.float16).max) / 64)
    output, _ = softmax_attention(q, k, v, log_decay=log_decay, paradigm=paradigm)
    exact, _ = softmax_attention(q.double(), k.double(), v.double(), log_decay=log_decay, paradigm=Paradigm.PARALLEL)
    assert_close(output.double(), exact, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_position_a_million_is_as_good_as_zero(paradigm, dtype):
    q, k, v = make(length=40, dtype=dtype)
    log_decay = -torch.tensor([1.2528, 0.7, 0.1, 0.0]) / 512
    shifts = []
    for read in (20, 20 + 1_000_000):
        state = ring(20, read=read, dtype=dtype)
        state = state._replace(keys=torch.ones_like(state.keys), values=torch.ones_like(state.values))
        output, _ = softmax_attention(
            q, k, v, window=20, log_decay=log_decay, initial_state=state, chunk_size=16, paradigm=paradigm
        )
        assert output.dtype == dtype
        shifts.append(output)
    bit_for_bit(shifts[0], shifts[1])
    assert torch.isfinite(shifts[1]).all()


@pytest.mark.parametrize("chunk_size", [4, 64])
def test_a_cache_of_a_million_keys_with_a_decay_is_finite(chunk_size):
    past = torch.randn(1, 1_000_000, 1, 2)
    state = GrowingCache(past, past, torch.tensor([999_990]))
    log_decay = torch.tensor([-1.2528, -0.1]) / 512
    q, k, v = (torch.randn(1, 9, 1, 2) for _ in range(3))
    options = {"log_decay": log_decay, "initial_state": state, "chunk_size": chunk_size}
    outputs = [softmax_attention(q, k, v, paradigm=paradigm, **options)[0] for paradigm in PARADIGMS]
    assert torch.isfinite(outputs[0]).all()
    for output in outputs[1:]:
        assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("decayed", [False, True])
def test_low_precision_stays_near_float64(paradigm, dtype, tolerance, decayed):
    q, k, v = make(length=64, dtype=dtype)
    log_decay = torch.linspace(-0.05, 0, 4) if decayed else None
    output, state = softmax_attention(
        q, k, v, log_decay=log_decay, output_final_state=True, chunk_size=16, paradigm=paradigm
    )
    exact, _ = softmax_attention(q.double(), k.double(), v.double(), log_decay=log_decay, paradigm=Paradigm.PARALLEL)
    assert output.dtype == state.keys.dtype == state.values.dtype == dtype
    assert_close(output.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("decayed", [False, True])
def test_a_cache_keeps_its_dtype(paradigm, decayed):
    q, k, v = make(length=4, dtype=torch.bfloat16)
    log_decay = torch.linspace(-0.05, 0, 4) if decayed else None
    for state in (ring(9, dtype=torch.float32), GrowingCache(*ring(3, dtype=torch.float32))):
        output, final_state = softmax_attention(
            q, k, v, log_decay=log_decay, initial_state=state, output_final_state=True, paradigm=paradigm
        )
        assert output.dtype == torch.bfloat16
        assert final_state.keys.dtype == final_state.values.dtype == torch.float32


def test_memory_of_the_chunkwise_backward_is_linear():
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


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize(("window", "context"), [(None, 0), (None, 5), (4, 0), (4, 9), (1, 3), (30, 40)])
@pytest.mark.parametrize("length", [1, 11])
def test_flops_are_what_a_counter_counts(paradigm, window, context, length):
    q, k, v = make(batch_size=1, length=length)
    state = None
    if context:
        tokens = torch.zeros(context, 2, 4, dtype=torch.float64)
        kind = GrowingCache if window is None else RingCache
        state = cache_of(kind, [tokens], [tokens], context if window is None else window)
    # torch does not count its fused CPU kernel, but does the same products one by one
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        softmax_attention(
            q, k, v, window=window, initial_state=state, output_final_state=True, chunk_size=3, paradigm=paradigm
        )
    assert counter.get_total_flops() == 4 * softmax_flops(
        paradigm, length, 4, 4, window=window, chunk_size=3, context=context
    )


@pytest.mark.parametrize("case", ["fresh", "growing", "ring", "window", "packed"])
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_compiles_into_one_graph_with_gradients(paradigm, case):
    q, k, v = make(batch_size=1 if case == "packed" else 2, length=6, requires_grad=True)
    options = {"output_final_state": True, "chunk_size": 4, "log_decay": torch.linspace(-0.1, 0, 4).double()}
    if case == "growing":
        options["initial_state"] = GrowingCache(*ring(3, read=2))
    if case in ("ring", "packed"):
        options["initial_state"] = ring(9, read=2)
    if case == "window":
        options |= {"initial_state": ring(3, read=5), "window": 3}
    if case == "packed":
        options["cu_seqlens"] = torch.tensor([0, 2, 6])
    torch._dynamo.reset()
    compiled = torch.compile(softmax_attention, fullgraph=True, backend="aot_eager")
    results = []
    for function in (softmax_attention, compiled):
        output, state = function(q, k, v, **options, paradigm=paradigm)
        results.append((output, *state, *torch.autograd.grad(output.square().sum() + state.keys.sum(), (q, k, v))))
    for eager, graph in zip(*results, strict=True):
        exactly(graph, eager)
    assert type(state) is (RingCache if case in ("ring", "window", "packed") else GrowingCache)


@pytest.mark.parametrize("case", ["fresh", "growing", "packed"])
@pytest.mark.parametrize("paradigm", [Paradigm.PARALLEL, Paradigm.RECURRENT])
def test_lengths_share_a_graph(paradigm, case):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(softmax_attention, fullgraph=True, backend=counter)
    for length in (33, 40, 43, 48):
        q, k, v = make(batch_size=1, length=length)
        options = {"log_decay": torch.linspace(-0.01, 0, 4), "output_final_state": True}
        if case == "packed":
            options["cu_seqlens"] = torch.tensor([0, 5, length])
        if case == "growing":
            options["initial_state"] = GrowingCache(*ring(length // 3, batch_size=1))
        exactly(
            compiled(q, k, v, **options, paradigm=paradigm)[0],
            softmax_attention(q, k, v, **options, paradigm=paradigm)[0],
        )
    # one for the first length, one for any
    assert counter.frame_count == 2


@pytest.mark.parametrize("window", [None, 5])
def test_decoding_compiles_once(window):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(q, k, v, state):
        return softmax_attention(
            q, k, v, window=window, initial_state=state, output_final_state=True, paradigm=Paradigm.RECURRENT
        )

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    q, k, v = make(length=20)
    whole, _ = softmax_attention(q, k, v, window=window, paradigm=Paradigm.PARALLEL)
    state = ring(20 if window is None else window)
    with torch.no_grad():
        for t in range(20):
            output, state = compiled(*(x[:, t : t + 1] for x in (q, k, v)), state)
            exactly(output, whole[:, t : t + 1])
        assert counter.frame_count == 1
        if window is None:
            with pytest.raises(RuntimeError, match="allocated for fewer tokens"):
                compiled(*(x[:, :1] for x in (q, k, v)), state)
    assert counter.frame_count == 1
