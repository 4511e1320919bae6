"""The contract of a sequence mixer, on every built-in one: a new mixer joins by a line in CONFIGS.

Mathematics is checked in float64 at 1e-9; low precision has tests of its own.
"""

import itertools
from dataclasses import replace
from functools import cache, partial
from typing import Literal

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from seqmix.mixers import MIXERS, ContractError, MixerConfig, Paradigm, SequenceMixer, Traits
from seqmix.mixers.attention import AttentionConfig
from seqmix.mixers.linear_attention import LinearAttentionConfig
from seqmix.mixers.retention import RetentionConfig
from seqmix.mixers.state import clone, concatenate, from_dict, map_state, nbytes, select, to_dict

D_MODEL = 12
PLAIN = {"gate": "none", "head_norm": "none", "rotation": "none", "row_norm": False}

CONFIGS: dict[str, MixerConfig] = {
    "retention": RetentionConfig(n_heads=3, chunk_size=3),
    "retention plain": RetentionConfig(n_heads=3, chunk_size=3, **PLAIN),
    "retention learnable": RetentionConfig(n_heads=2, chunk_size=4, decay="constant", gamma=0.8, learnable_decay=True),
    "retention no decay": RetentionConfig(n_heads=1, chunk_size=2, decay="none", head_norm="rms", rotation="rope"),
    "retention shift invariant": RetentionConfig(n_heads=3, chunk_size=3, decay="log_uniform", row_norm=False),
    "linear attention": LinearAttentionConfig(n_heads=3, chunk_size=3),
    "linear attention unnormed": LinearAttentionConfig(n_heads=2, chunk_size=4, denominator=False, head_norm="rms"),
    "attention rope": AttentionConfig(n_heads=3, chunk_size=3),
    "attention xpos": AttentionConfig(n_heads=2, chunk_size=4, positions="xpos"),
    "attention none": AttentionConfig(n_heads=3, chunk_size=2, positions="none"),
    "attention grouped": AttentionConfig(n_heads=6, n_kv_heads=2, chunk_size=3),
    "attention window": AttentionConfig(n_heads=3, chunk_size=3, window=4),
    "attention xpos window": AttentionConfig(n_heads=2, n_kv_heads=1, chunk_size=3, positions="xpos", window=1),
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

SEEDS = st.integers(0, 2**32)
exactly = partial(assert_close, rtol=1e-9, atol=1e-9)
bit_for_bit = partial(assert_close, rtol=0, atol=0)


@cache
def build(name, device, dtype=torch.float64) -> SequenceMixer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixer = CONFIGS[name].build(D_MODEL, layer_idx=0, n_layers=1).to(device, dtype)
    mixer.built_as = (name, device)
    return mixer


@pytest.fixture(scope="module", params=itertools.product(CONFIGS, DEVICES), ids=" on ".join)
def mixer(request):
    return build(*request.param)


def subjects(names):
    """Only these mixers."""
    return pytest.mark.parametrize("mixer", [*itertools.product(names, DEVICES)], ids=" on ".join, indirect=True)


packing = subjects([name for name, config in CONFIGS.items() if config.traits.packing])
stepping = subjects([name for name, config in CONFIGS.items() if Paradigm.RECURRENT in config.traits.paradigms])
one_a_kind = subjects({config.kind: name for name, config in reversed(CONFIGS.items())}.values())


def paradigms_of(mixer):
    return sorted(mixer.traits.paradigms)


class Draw:
    """Random tensors of one seed."""

    def __init__(self, mixer, seed):
        self.mixer, self.generator = mixer, torch.Generator().manual_seed(seed)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.mixer.device, self.mixer.dtype)

    def tokens(self, batch_size, length):
        return self.randn(batch_size, length, D_MODEL)

    def like(self, x):
        return self.randn(*x.shape).to(x.dtype)

    def state(self, batch_size, kind):
        """None; nothing read; a prefix read; a prefix read and every float leaf moved."""
        if kind == "none":
            return None
        if kind == "initial":
            return self.mixer.init_state(batch_size)
        length = int(torch.randint(1, 8, (), generator=self.generator))
        with torch.no_grad():
            _, state = self.mixer(self.tokens(batch_size, length), return_state=True)
            if kind == "moved":
                # by factors above 0: denominators stay positive, and empty slots of a cache empty
                state = map_state(lambda x: x * self.like(x).exp() if x.is_floating_point() else x, state)
        return state


STATES = st.sampled_from(["none", "initial", "read", "moved"])


def float_leaves(state):
    return [x for x in to_dict(state or ()).values() if x.is_floating_point()]


def as_leaves(state):
    """The state as leaves of a new graph."""
    return None if state is None else map_state(lambda x: x.detach().requires_grad_(x.is_floating_point()), state)


def same_state(actual, expected, compare=exactly):
    assert type(actual) is type(expected)
    assert to_dict(actual).keys() == to_dict(expected).keys()
    for name, leaf in to_dict(expected).items():
        assert actual is not None
        compare(to_dict(actual)[name], leaf, msg=lambda text, name=name: f"{name} of the state: {text}")


def mix(mixer, x, state, **options):
    """Without grad, where a state given may be consumed."""
    with torch.no_grad():
        return mixer(x, None if state is None else clone(state), return_state=True, **options)


def run_with_gradients(mixer, x, state, draw, **options):
    """Output, final state's float leaves, and gradients of input, state and parameters."""
    x, state = x.detach().requires_grad_(), as_leaves(state)
    y, final_state = mixer(x, state, return_state=True, **options)
    outputs = [y, *float_leaves(final_state)]
    leaves = [x, *float_leaves(state), *mixer.parameters()]
    # zeros are the empty slots of a cache: nothing can depend on what they hold
    upstream = [draw.like(output) * (output != 0) for output in outputs]
    grads = torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)
    return [*outputs, *grads], final_state


def test_every_built_in_mixer_is_here():
    built_in = {kind for kind in MIXERS.kinds() if MIXERS.origin(kind).startswith("seqmix.mixers.")}
    assert {config.kind for config in CONFIGS.values()} == built_in


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, batch_size=st.integers(1, 3), length=st.integers(1, 11), kind=STATES)
def test_paradigms_agree(mixer, seed, batch_size, length, kind):
    draw = Draw(mixer, seed)
    x, state = draw.tokens(batch_size, length), draw.state(batch_size, kind)
    results = []
    for paradigm in paradigms_of(mixer):
        upstream = Draw(mixer, seed + 1)
        results.append(run_with_gradients(mixer, x, state, upstream, paradigm=paradigm))
    for tensors, final_state in results[1:]:
        same_state(final_state, results[0][1])
        for actual, expected in zip(tensors, results[0][0], strict=True):
            exactly(actual, expected)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, length=st.integers(2, 12), kind=STATES, data=st.data())
def test_any_split_equals_the_whole(mixer, seed, length, kind, data):
    draw = Draw(mixer, seed)
    x, state = draw.tokens(2, length), draw.state(2, kind)
    cut = data.draw(st.integers(1, length - 1), "cut")
    for first, second in itertools.product(paradigms_of(mixer), repeat=2):
        y, final_state = mix(mixer, x, state, paradigm=first)
        y1, between = mix(mixer, x[:, :cut], state, paradigm=first)
        y2, after = mix(mixer, x[:, cut:], between, paradigm=second)
        exactly(torch.cat((y1, y2), dim=1), y)
        same_state(after, final_state)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, lengths=st.lists(st.integers(1, 4), min_size=2, max_size=4), kind=STATES, data=st.data())
def test_gradients_through_pieces_equal_those_of_the_whole(mixer, seed, lengths, kind, data):
    draw = Draw(mixer, seed)
    x, state = draw.tokens(2, sum(lengths)), draw.state(2, kind)
    paradigms = data.draw(st.lists(st.sampled_from(paradigms_of(mixer)), min_size=len(lengths), max_size=len(lengths)))
    expected, final_state = run_with_gradients(mixer, x, state, Draw(mixer, seed + 1))

    def in_pieces(x, state, return_state):
        outputs = []
        for piece, paradigm in zip(x.split(lengths, dim=1), paradigms, strict=True):
            y, state = mixer(piece, state, paradigm=paradigm, return_state=return_state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    in_pieces.parameters = mixer.parameters
    actual, after = run_with_gradients(in_pieces, x, state, Draw(mixer, seed + 1))
    same_state(after, final_state)
    for a, b in zip(actual, expected, strict=True):
        exactly(a, b)


@packing
@settings(max_examples=20, deadline=None)
@given(
    seed=SEEDS,
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(sum),
    kind=STATES,
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_packed_documents_are_sequences_of_their_own(mixer, seed, lengths, kind, dtype):
    draw = Draw(mixer, seed)
    x, state = draw.tokens(1, sum(lengths)), draw.state(len(lengths), kind)
    following = draw.tokens(len(lengths), 2)
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=mixer.device)
    for paradigm in paradigms_of(mixer):
        y, states = mix(mixer, x, state, cu_seqlens=borders, paradigm=paradigm)
        z, _ = mix(mixer, following, states)
        initial = mixer.init_state(len(lengths)) if state is None else state
        for n, document in enumerate(x.split(lengths, dim=1)):
            row = torch.tensor([n], device=mixer.device)
            alone, after = select(initial, row), select(states, row)
            if lengths[n]:
                expected, alone = mix(mixer, document, alone)
                exactly(y[:, sum(lengths[:n]) : sum(lengths[: n + 1])], expected)
            # a growing state may hold a document's tokens in more room than it would need alone
            if mixer.traits.state == "constant":
                same_state(after, alone)
            exactly(z[row], mix(mixer, following[row], alone)[0])


@packing
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(sum), kind=STATES)
def test_gradients_of_packed_documents_are_those_of_sequences(mixer, seed, lengths, kind):
    draw = Draw(mixer, seed)
    x, state = draw.tokens(1, sum(lengths)), draw.state(len(lengths), kind)
    borders = torch.tensor([0, *itertools.accumulate(lengths)], device=mixer.device)

    # a growing state may hold a document's tokens in more room than it would need alone
    wants_state = mixer.traits.state == "constant"

    def one_by_one(x, state, **_):
        outputs, states = [], []
        for n, document in enumerate(x.split(lengths, dim=1)):
            row = torch.tensor([n], device=mixer.device)
            after = select(mixer.init_state(len(lengths)) if state is None else state, row)
            if lengths[n]:
                y, after = mixer(document, after, return_state=True)
                outputs.append(y)
            states.append(after)
        return torch.cat(outputs, dim=1), concatenate(states) if wants_state else None

    def packed(x, state, paradigm, **_):
        y, states = mixer(x, state, cu_seqlens=borders, paradigm=paradigm, return_state=True)
        return y, states if wants_state else None

    one_by_one.parameters = packed.parameters = mixer.parameters
    expected, _ = run_with_gradients(one_by_one, x, state, Draw(mixer, seed + 1))
    for paradigm in paradigms_of(mixer):
        actual, _ = run_with_gradients(packed, x, state, Draw(mixer, seed + 1), paradigm=paradigm)
        for a, b in zip(actual, expected, strict=True):
            exactly(a, b)


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, length=st.integers(2, 12), kind=STATES, data=st.data())
def test_the_future_changes_nothing(mixer, seed, length, kind, data):
    draw = Draw(mixer, seed)
    x, state = draw.tokens(2, length), draw.state(2, kind)
    cut = data.draw(st.integers(1, length - 1), "cut")
    other = torch.cat((x[:, :cut], 100 * draw.tokens(2, length - cut)), dim=1)
    for paradigm in paradigms_of(mixer):
        y, y_other = (mix(mixer, tokens, state, paradigm=paradigm)[0] for tokens in (x, other))
        assert_close(y_other[:, :cut], y[:, :cut], rtol=0, atol=1e-12)
        assert not torch.equal(y_other[:, cut:], y[:, cut:])


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, length=st.integers(1, 8), kind=STATES)
def test_rows_of_a_batch_are_independent(mixer, seed, length, kind):
    draw = Draw(mixer, seed)
    x, state = draw.tokens(3, length), draw.state(3, kind)
    for paradigm in paradigms_of(mixer):
        y, states = mix(mixer, x, state, paradigm=paradigm)
        for n in range(3):
            row = torch.tensor([n], device=mixer.device)
            alone, after = mix(mixer, x[n : n + 1], None if state is None else select(state, row), paradigm=paradigm)
            exactly(y[n : n + 1], alone)
            same_state(select(states, row), after)


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, length=st.integers(1, 6), kind=STATES, rows=st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_rows_of_a_state_can_be_reordered_and_repeated(mixer, seed, length, kind, rows):
    draw = Draw(mixer, seed)
    rows = torch.tensor(rows, device=mixer.device)
    x, following, state = draw.tokens(3, length), draw.tokens(3, 3), draw.state(3, kind)
    _, before = mix(mixer, x, state)
    y, after = mix(mixer, following, before)
    y_chosen, after_chosen = mix(mixer, following[rows], select(before, rows))
    exactly(y_chosen, y[rows])
    same_state(after_chosen, select(after, rows))


@stepping
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, length=st.integers(1, 8), kind=STATES)
def test_token_by_token_equals_the_whole(mixer, seed, length, kind):
    draw = Draw(mixer, seed)
    x, state = draw.tokens(2, length), draw.state(2, kind)
    y, final_state = mix(mixer, x, state)
    outputs = []
    # None is not a state to step from
    state = mixer.init_state(2) if state is None else clone(state)
    with torch.no_grad():
        for t in range(length):
            output, state = mixer.step(x[:, t : t + 1], state)
            outputs.append(output)
    exactly(torch.cat(outputs, dim=1), y)
    same_state(state, final_state)


@pytest.mark.parametrize("grad_mode", [False, True])
def test_the_initial_state_is_that_of_nothing_read(mixer, grad_mode):
    x = Draw(mixer, 0).tokens(3, 7)
    for paradigm in paradigms_of(mixer):
        with torch.set_grad_enabled(grad_mode):
            y, final_state = mixer(x, paradigm=paradigm, return_state=True)
            from_initial = mixer(x, mixer.init_state(3), paradigm=paradigm, return_state=True)
            allocated = mixer(x, mixer.init_state(3, max_length=7), paradigm=paradigm, return_state=True)
            alone, no_state = mixer(x, paradigm=paradigm)
        exactly(from_initial[0], y)
        same_state(from_initial[1], final_state)
        exactly(allocated[0], y)
        exactly(alone, y)
        assert no_state is None
        # the same as far as anything read later can tell
        following = Draw(mixer, 1).tokens(3, 1)
        if mixer.traits.state == "constant":
            exactly(mix(mixer, following, allocated[1])[0], mix(mixer, following, final_state)[0])


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, length=st.integers(1, 6), kind=st.sampled_from(["initial", "read", "moved"]), leaves=st.booleans())
def test_under_autograd_a_state_is_never_written(mixer, seed, length, kind, leaves):
    draw = Draw(mixer, seed)
    x, state = draw.tokens(2, length), draw.state(2, kind)
    state = as_leaves(state) if leaves else state
    before, versions = clone(state), [leaf._version for leaf in to_dict(state).values()]
    for paradigm in paradigms_of(mixer):
        y, final_state = mixer(x, state, paradigm=paradigm, return_state=True)
        (y.sum() + sum(leaf.sum() for leaf in float_leaves(final_state))).backward(inputs=list(mixer.parameters()))
        assert [leaf._version for leaf in to_dict(state).values()] == versions
        same_state(state, before, bit_for_bit)
    mixer.zero_grad()


def test_a_state_is_tensors_with_a_row_a_sequence(mixer):
    for state in (mixer.init_state(5), mix(mixer, Draw(mixer, 0).tokens(5, 3), None)[1]):
        leaves = to_dict(state)
        assert leaves
        for leaf in leaves.values():
            assert leaf.shape[0] == 5
            assert leaf.device.type == mixer.device.type
            assert leaf.dtype in (mixer.state_dtype, torch.int64)


def test_a_states_size_in_tokens_is_as_declared(mixer):
    sizes = {}
    for length in (8, 16, 64):
        _, state = mix(mixer, Draw(mixer, 0).tokens(1, length), None)
        sizes[length] = nbytes(state)
    if mixer.traits.state == "constant":
        assert sizes[8] == sizes[16] == sizes[64] == nbytes(mixer.init_state(1))
    else:
        assert sizes[8] < sizes[16] < sizes[64]


@pytest.mark.parametrize("shift", [1000, 1_000_000])
def test_absolute_position_matters_only_where_declared(mixer, shift):
    draw = Draw(mixer, 0)
    x, borders = draw.tokens(2, 9), torch.tensor([0, 4, 9], device=mixer.device)
    for paradigm in paradigms_of(mixer):
        results = []
        # where 8 tokens count as read, a window's cache is full in both cases (of zeros)
        for start in (8, 8 + shift):
            state = map_state(
                lambda leaf, start=start: leaf if leaf.is_floating_point() else leaf + start, mixer.init_state(2)
            )
            y1, between = mix(mixer, x[:, :5], state, paradigm=paradigm)
            y2, _ = mix(mixer, x[:, 5:], between, paradigm=paradigm)
            outputs = [y1, y2]
            if mixer.traits.packing:
                outputs.append(mix(mixer, x[:1], state, paradigm=paradigm, cu_seqlens=borders)[0])
            results.append(torch.cat([y.flatten() for y in outputs]))
        change = (results[1] - results[0]).abs().max()
        # angles of a million are rounded to 1e-10
        assert change < 1e-8 if mixer.traits.shift_invariant else change > 1e-5


def test_positions_of_a_million_are_finite(mixer):
    for dtype in (torch.float32, torch.bfloat16):
        low = build(*mixer.built_as, dtype)
        state = map_state(lambda x: x if x.is_floating_point() else x + 10**6, low.init_state(2))
        for paradigm in paradigms_of(low):
            y, after = mix(low, Draw(low, 0).tokens(2, 5), state, paradigm=paradigm)
            assert y.isfinite().all()
            assert all(leaf.isfinite().all() for leaf in to_dict(after).values())
            assert all((leaf >= 10**6).all() for leaf in to_dict(after).values() if not leaf.is_floating_point())


def test_a_state_survives_the_disk(mixer, tmp_path):
    draw = Draw(mixer, 0)
    for paradigm in paradigms_of(mixer):
        for length in (1, 5):
            _, state = mix(mixer, draw.tokens(2, length), draw.state(2, "moved"), paradigm=paradigm)
            save_file(to_dict(state), tmp_path / "state.safetensors")
            loaded = from_dict(mixer.init_state(2), load_file(tmp_path / "state.safetensors", mixer.device.type))
            same_state(loaded, state, bit_for_bit)
            following = draw.tokens(2, 3)
            bit_for_bit(mix(mixer, following, loaded)[0], mix(mixer, following, state)[0])


def test_every_parameter_learns(mixer):
    mixer.zero_grad()
    y, _ = mixer(Draw(mixer, 0).tokens(2, 9))
    (y * Draw(mixer, 1).like(y)).sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    mixer.zero_grad()


def test_every_parameter_is_initialised_from_the_global_generator(mixer):
    fresh = CONFIGS[mixer.built_as[0]].build(D_MODEL, layer_idx=0, n_layers=1).to(mixer.device)
    parameters = []
    for seed in (0, 0, 1):
        with torch.no_grad(), torch.random.fork_rng():
            for parameter in fresh.parameters():
                parameter.fill_(torch.nan)
            torch.manual_seed(seed)
            fresh.reset_parameters()
        parameters.append([parameter.detach().clone() for parameter in fresh.parameters()])
        assert all(parameter.isfinite().all() for parameter in fresh.parameters())
    for first, again in zip(*parameters[:2], strict=True):
        bit_for_bit(again, first)
    assert any(not torch.equal(a, b) for a, b in zip(*parameters[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_near_float64(mixer, dtype):
    low = build(*mixer.built_as, dtype)
    # the same rounded numbers in both
    exact = CONFIGS[mixer.built_as[0]].build(D_MODEL, layer_idx=0, n_layers=1).to(mixer.device, torch.float64)
    exact.load_state_dict(low.state_dict())
    draw = Draw(low, 0)
    x = draw.tokens(2, 40)
    y_exact, _ = mix(exact, x.double(), None)
    initial = low.init_state(2)
    for paradigm in paradigms_of(low):
        y1, state = mix(low, x[:, :23], initial, paradigm=paradigm)
        y2, state = mix(low, x[:, 23:], state, paradigm=paradigm)
        y = torch.cat((y1, y2), dim=1)
        assert y.dtype == dtype
        assert [leaf.dtype for leaf in to_dict(state).values()] == [leaf.dtype for leaf in to_dict(initial).values()]
        error = (y.double() - y_exact).norm() / y_exact.norm()
        assert error <= TOLERANCES[dtype], f"{paradigm}: {error:.1e}"


TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 2e-2}


@one_a_kind
def test_compiles_into_one_graph(mixer):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixer, fullgraph=True, backend=counter)
    compiled.parameters = mixer.parameters
    for seed in range(2):
        draw = Draw(mixer, seed)
        x, state = draw.tokens(2, 7), draw.state(2, "initial")
        expected, _ = run_with_gradients(mixer, x, state, Draw(mixer, 2))
        actual, _ = run_with_gradients(compiled, x, state, Draw(mixer, 2))
        for a, b in zip(actual, expected, strict=True):
            exactly(a, b)
    assert counter.frame_count == 1


@one_a_kind
def test_decoding_compiles_once(mixer):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(mixer.step, fullgraph=True, backend=counter)
    x = Draw(mixer, 0).tokens(2, 12)
    state, outputs = mixer.init_state(2, max_length=12), []
    with torch.no_grad():
        for t in range(12):
            y, state = step(x[:, t : t + 1], state)
            outputs.append(y)
    assert counter.frame_count == 1
    exactly(torch.cat(outputs, dim=1), mix(mixer, x, None)[0])


def test_what_is_not_declared_is_refused(mixer):
    draw = Draw(mixer, 0)
    x, borders = draw.tokens(1, 4), torch.tensor([0, 4], device=mixer.device)
    declared, kept = mixer.traits, mixer.paradigm
    try:
        mixer.traits = replace(declared, paradigms=frozenset({kept}), packing=False)
        for other in set(Paradigm) - {kept}:
            with pytest.raises(ContractError, match=f"{mixer.kind} has no paradigm '{other}'; it declares {kept}"):
                mixer(x, paradigm=other)
        if kept is not Paradigm.RECURRENT:
            with pytest.raises(ContractError, match="has no paradigm 'recurrent'"):
                mixer.step(x[:, :1], mixer.init_state(1))
        with pytest.raises(ContractError, match=f"{mixer.kind} does not declare packing"):
            mixer(x, cu_seqlens=borders)
        mixer(x)
    finally:
        mixer.traits = declared
    with pytest.raises(ContractError, match=r"has no paradigm 'paralel'; it declares "):
        mixer(x, paradigm="paralel")


@pytest.mark.parametrize("shape", [(2, 0, D_MODEL), (4, D_MODEL)])
def test_shapes_that_do_not_fit_are_refused(mixer, shape):
    with pytest.raises(ContractError, match=r"takes \[batch, tokens >= 1, d_model\], and was given \[\d, "):
        mixer(torch.zeros(shape, dtype=mixer.dtype, device=mixer.device))


@packing
@pytest.mark.parametrize(
    ("batch_size", "borders", "sentence"),
    [
        (2, torch.tensor([0, 4]), "a batch of 2 and borders"),
        (1, torch.tensor([[0, 4]]), r"a batch of 1 and borders \[1, 2\]"),
        (1, torch.tensor([0.0, 4.0]), r"borders \[2\] torch.float32"),
        (1, torch.tensor([0, 3]), "must rise from 0 to the 4 tokens given"),
        (1, torch.tensor([1, 4]), "must rise from 0"),
        (1, torch.tensor([0, 3, 1, 4]), "must rise from 0"),
        (1, torch.tensor([0, 5]), "must rise from 0"),
        (1, torch.tensor([0]), "must rise from 0"),
        (1, torch.tensor([], dtype=torch.int64), "must rise from 0"),
    ],
)
def test_borders_that_do_not_fit_are_refused(mixer, batch_size, borders, sentence):
    for paradigm in paradigms_of(mixer):
        with pytest.raises(ContractError, match=sentence):
            mixer(Draw(mixer, 0).tokens(batch_size, 4), paradigm=paradigm, cu_seqlens=borders)


def test_a_state_of_other_sequences_is_refused(mixer):
    x = Draw(mixer, 0).tokens(3, 4)
    for paradigm in paradigms_of(mixer):
        for rows in (1, 2, 4):
            with pytest.raises(ContractError, match=f"3 sequences and a state of {rows}"):
                mixer(x, mixer.init_state(rows), paradigm=paradigm)
            if mixer.traits.packing:
                with pytest.raises(ContractError, match=f"3 sequences and a state of {rows}"):
                    mixer(x[:1], mixer.init_state(rows), paradigm=paradigm, cu_seqlens=torch.tensor([0, 2, 2, 4]))


@stepping
def test_a_step_is_one_token(mixer):
    with pytest.raises(ContractError, match="a step mixes one token, and 2 were given"):
        mixer.step(Draw(mixer, 0).tokens(1, 2), mixer.init_state(1))


def test_a_state_is_returned_where_it_is_wanted_alone(mixer, monkeypatch):
    x, inner = Draw(mixer, 0).tokens(1, 4), mixer.mix
    assert mixer(x)[1] is None
    assert mixer(x, return_state=True)[1] is not None
    # whatever a mixer's own method returns
    monkeypatch.setattr(mixer, "mix", lambda *args: inner(*args[:-1], True))
    assert mixer(x)[1] is None


def test_a_paradigm_may_be_given_by_name(mixer, monkeypatch):
    x, inner, given = Draw(mixer, 0).tokens(1, 7), mixer.mix, []
    monkeypatch.setattr(mixer, "mix", lambda *args: given.append(args[2]) or inner(*args))
    for paradigm in mixer.traits.paradigms:
        mixer(x, paradigm=str(paradigm))
        assert given[-1] is paradigm


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configured_paradigm_is_the_default(name):
    for paradigm in CONFIGS[name].traits.paradigms:
        config = CONFIGS[name].model_copy(update={"paradigm": paradigm})
        seen = []
        mixer = config.build(D_MODEL, layer_idx=0, n_layers=1)
        inner = mixer.mix
        mixer.mix = lambda *args, inner=inner, seen=seen: seen.append(args[2]) or inner(*args)
        mixer(torch.randn(1, 1, D_MODEL))
        mixer(torch.randn(1, 5, D_MODEL))
        assert seen == [paradigm, paradigm]
        assert type(config)(**config.model_dump()) == config


class OneWayConfig(MixerConfig):
    kind: Literal["one_way"] = "one_way"
    paradigm: Paradigm = Field(default=Paradigm.RECURRENT, strict=False)

    @property
    def traits(self):
        paradigms = frozenset({Paradigm.RECURRENT})
        return Traits(paradigms=paradigms, state="constant", packing=False, shift_invariant=True)

    def build(self, d_model, *, layer_idx, n_layers):
        raise NotImplementedError


def test_a_default_paradigm_must_be_declared():
    assert OneWayConfig().paradigm is Paradigm.RECURRENT
    with pytest.raises(ValidationError, match="one_way has no paradigm 'parallel'; it declares recurrent"):
        OneWayConfig(paradigm="parallel")
