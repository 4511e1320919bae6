"""The decay family against its definition, token by token: every paradigm, decay, state, packing, and all gradients."""

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from seqmix.ops import chunks
from seqmix.ops.decay import decay_flops, decay_recurrence
from seqmix.ops.paradigm import Paradigm
from seqmix.ops.recurrence import Recurrence
from seqmix.registry import SeqmixError
from seqmix.testing.counting import count_flops

PARADIGMS = list(Paradigm)
OPS = [Paradigm.RECURRENT, Paradigm.CHUNKWISE]
"""The paradigms that are custom ops."""
DECAYS = ["none", "head", "token", "key"]
"""log_decay None, [H], [B T H], [B T H K]."""
INPUTS = ["q", "k", "v", "log_decay", "initial_state"]
# decays a key dimension are formed by halves of blocks of 2, 4, 8, 16, .. tokens
LENGTHS = st.integers(1, 9) | st.sampled_from([15, 16, 17, 31, 33, 40, 45])
CHUNKS = st.integers(1, 10) | st.sampled_from([16, 17, 32, 40, 64])

bit_for_bit = partial(assert_close, rtol=0, atol=0)


def exactly(actual, expected, name=""):
    assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")


@dataclass(frozen=True)
class Case:
    """Everything that a map can be asked; sequences are rows of a batch or packed documents."""

    decay: str
    lengths: list[int]
    packed: bool = False
    n_heads: int = 2
    key_dim: int = 3
    value_dim: int = 2
    has_state: bool = True
    strength: float = 1.0
    """Standard deviation of the log-decays."""
    resets: tuple[int, ...] = ()
    """Tokens whose log-decay is -inf; heads, where it is fixed a head."""
    resets_one_key: bool = False
    strided: bool = False
    scale: float | None = None
    chunk_size: int = 4
    dtype: torch.dtype = torch.float64
    border_dtype: torch.dtype = torch.int64
    seed: int = 0

    @property
    def borders(self):
        if not self.packed:
            return None
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=self.border_dtype)

    @property
    def shape(self):
        return (1, sum(self.lengths)) if self.packed else (len(self.lengths), self.lengths[0])

    def inputs(self):
        """Arguments by name; those that are None are left out. Decays and states are wide, as mixers pass them."""
        generator = torch.Generator().manual_seed(self.seed)
        randn = partial(torch.randn, generator=generator, dtype=torch.float64)
        wide = torch.promote_types(self.dtype, torch.float32)
        widths = [self.key_dim, self.key_dim, self.value_dim]
        fused = randn(*self.shape, self.n_heads, sum(widths)).to(self.dtype)
        inputs = dict(zip("qkv", fused.split(widths, dim=-1), strict=True))
        if self.decay != "none":
            per_token = () if self.decay == "head" else self.shape
            per_key = (self.key_dim,) if self.decay == "key" else ()
            a = -self.strength * randn(*per_token, self.n_heads, *per_key).abs()
            resets = [reset % a.shape[len(per_token) // 2] for reset in self.resets]
            keys = (slice(1),) if self.resets_one_key and per_key else ()
            a[(slice(None), resets, ..., *keys) if per_token else (resets,)] = -math.inf
            inputs["log_decay"] = a.to(wide)
        if self.has_state:
            inputs["initial_state"] = randn(len(self.lengths), self.n_heads, self.key_dim, self.value_dim).to(wide)
        if self.strided:
            return {name: x if name in "qkv" else restrided(x) for name, x in inputs.items()}
        return {name: x.contiguous() for name, x in inputs.items()}

    def options(self, paradigm):
        how = {"paradigm": paradigm, "chunk_size": self.chunk_size}
        return {"scale": self.scale, "cu_seqlens": self.borders, "output_final_state": True, **how}

    def run(self, paradigm, inputs):
        """Output and final state."""
        q, k, v = (inputs[name] for name in "qkv")
        log_decay, state = inputs.get("log_decay"), inputs.get("initial_state")
        return tuple(decay_recurrence(q, k, v, log_decay, initial_state=state, **self.options(paradigm)))

    def sequences(self, x):
        """A segment's tensor as one tensor a sequence."""
        return x[0].split(self.lengths) if self.packed else list(x)

    def segment(self, sequences):
        return torch.cat(sequences)[None] if self.packed else torch.stack(sequences)

    def cotangents(self):
        """Upstream gradients of output and final state, expanded as those of a sum are where strided."""
        randn = partial(torch.randn, generator=torch.Generator().manual_seed(self.seed + 1), dtype=torch.float64)
        width = 1 if self.strided else self.value_dim
        output, state = (*self.shape, self.n_heads), (len(self.lengths), self.n_heads, self.key_dim)
        of_output = randn(*output, width).expand(*output, self.value_dim).to(self.dtype)
        of_state = randn(*state, width).expand(*state, self.value_dim)
        return of_output, of_state.to(torch.promote_types(self.dtype, torch.float32))


def restrided(x):
    """The same numbers, not contiguous."""
    return x.repeat_interleave(2)[::2] if x.ndim == 1 else x.mT.contiguous().mT


@st.composite
def cases(draw, decays=tuple(DECAYS), packings=(False, True), lengths=LENGTHS):
    packed = draw(st.sampled_from(packings))
    if packed:
        sizes = draw(st.lists(st.just(0) | lengths, min_size=1, max_size=4).filter(sum))
    else:
        sizes = [draw(lengths)] * draw(st.integers(1, 2))
    length = sum(sizes) if packed else sizes[0]
    some, everywhere = st.lists(st.integers(0, length - 1), max_size=3).map(tuple), st.just(tuple(range(length)))
    return Case(
        decay=draw(st.sampled_from(decays)),
        lengths=sizes,
        packed=packed,
        n_heads=draw(st.integers(1, 2)),
        key_dim=draw(st.integers(1, 3)),
        value_dim=draw(st.integers(1, 3)),
        has_state=draw(st.booleans()),
        strength=draw(st.sampled_from([0.0, 0.01, 0.3, 5.0])),
        resets=draw(st.just(()) | some | everywhere),
        resets_one_key=draw(st.booleans()),
        strided=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.7])),
        chunk_size=draw(CHUNKS),
        border_dtype=draw(st.sampled_from([torch.int64, torch.int32])),
        seed=draw(st.integers(0, 2**32)),
    )


def define(case, inputs):
    """Output and final state by the recurrence itself."""
    scale = 1 / math.sqrt(case.key_dim) if case.scale is None else case.scale
    queries, keys, values = (case.sequences(inputs[name]) for name in "qkv")
    a, states = inputs.get("log_decay"), inputs.get("initial_state")
    decays = case.sequences(a) if case.decay in ("token", "key") else None
    outputs, final_states = [], []
    for n in range(len(case.lengths)):
        state = keys[n].new_zeros(case.n_heads, case.key_dim, case.value_dim) if states is None else states[n]
        rows = []
        for t in range(len(keys[n])):
            if a is not None:
                state = state * (a if decays is None else decays[n][t]).exp().reshape(case.n_heads, -1, 1)
            state = state + keys[n][t][:, :, None] * values[n][t][:, None, :]
            rows.append(scale * (queries[n][t][:, :, None] * state).sum(1))
        outputs.append(torch.stack(rows) if rows else values[n])
        final_states.append(state)
    return case.segment(outputs), torch.stack(final_states)


def with_leaves(inputs, names=tuple(INPUTS)):
    """The inputs, those named as leaves of a graph."""
    return {name: x.detach().requires_grad_(name in names) for name, x in inputs.items()}


def gradients(outputs, cotangents, inputs):
    """Gradients of the leaves by name, zero where nothing depends on one."""
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    pairs = [(x, g) for x, g in zip(outputs, cotangents, strict=True) if x.requires_grad]
    grads = [torch.zeros_like(x) for x in leaves.values()]
    if pairs:
        roots, upstream = zip(*pairs, strict=True)
        grads = torch.autograd.grad(roots, tuple(leaves.values()), upstream, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("kind", DECAYS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_output_state_and_gradients_are_the_definition(kind, packed, data):
    case = data.draw(cases([kind], [packed]))
    names = data.draw(st.just(INPUTS) | st.lists(st.sampled_from(INPUTS), min_size=1, unique=True), "requires grad")
    wanted = data.draw(st.sampled_from([slice(0, 2), slice(0, 1), slice(1, 2)]), "output, state or both")
    # chunks one by one, in groups of a few, and all at once
    elements = data.draw(st.sampled_from([1, 100, 400, chunks.ELEMENTS]), "elements of a group")
    inputs, cotangents = case.inputs(), case.cotangents()[wanted]
    leaves = with_leaves(inputs, names)
    expected = define(case, leaves)
    expected_gradients = gradients(expected[wanted], cotangents, leaves)
    for paradigm in PARADIGMS:
        leaves = with_leaves(inputs, names)
        versions = [x._version for x in leaves.values()]
        with mock.patch.object(chunks, "ELEMENTS", elements):
            actual = case.run(paradigm, leaves)
            actual_gradients = gradients(actual[wanted], cotangents, leaves)
        exactly(actual[0], expected[0], f"{paradigm} output")
        exactly(actual[1], expected[1], f"{paradigm} state")
        for name, gradient in actual_gradients.items():
            exactly(gradient, expected_gradients[name], f"{paradigm} gradient of {name}")
        assert [x._version for x in leaves.values()] == versions


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_an_example_by_hand(paradigm):
    # gamma = 1/2:  S = 4/2 + 1, 3/2 + 2, 3.5/2 + 3
    q, k, v = (torch.tensor(x, dtype=torch.float64).reshape(1, 3, 1, 1) for x in ([1, 1, 2], [1, 2, 1], [1, 1, 3]))
    log_decay = torch.tensor([-math.log(2)], dtype=torch.float64)
    state = torch.full((1, 1, 1, 1), 4.0, dtype=torch.float64)
    output, final_state = decay_recurrence(
        q, k, v, log_decay, initial_state=state, output_final_state=True, paradigm=paradigm
    )
    exactly(output.flatten(), torch.tensor([3, 3.5, 9.5], dtype=torch.float64))
    exactly(final_state.item(), 4.75)


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("lengths", [[64], [65], [130, 130], [63, 0, 70]], ids=str)
def test_more_tokens_than_a_block_of_kept_states(kind, lengths):
    case = Case(kind, lengths, packed=len(set(lengths)) > 1, strength=0.1, chunk_size=48)
    results = []
    for function in (partial(define, case), *(partial(case.run, paradigm) for paradigm in PARADIGMS)):
        leaves = with_leaves(case.inputs())
        outputs = function(leaves)
        results.append((*outputs, *gradients(outputs, case.cotangents(), leaves).values()))
    for paradigm, result in zip(PARADIGMS, results[1:], strict=True):
        for actual, expected in zip(result, results[0], strict=True):
            exactly(actual, expected, paradigm)


@pytest.mark.parametrize("kind", DECAYS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_pieces_equal_the_whole_with_gradients_through_the_state(kind, data):
    case = data.draw(cases([kind], lengths=st.integers(1, 20)))
    cuts = [data.draw(st.integers(0, length), "cut") for length in case.lengths]
    if not case.packed:
        cuts = cuts[:1] * len(cuts)
    rest = [length - cut for length, cut in zip(case.lengths, cuts, strict=True)]
    halves = [replace(case, lengths=sizes) for sizes in (cuts, rest) if sum(sizes)]
    paradigms = data.draw(st.tuples(*[st.sampled_from(PARADIGMS)] * 3), "whole, pieces")
    per_token = ("q", "k", "v") if kind in ("none", "head") else ("q", "k", "v", "log_decay")

    whole = with_leaves(case.inputs())
    outputs = case.run(paradigms[0], whole)
    expected = (*outputs, *gradients(outputs, case.cotangents(), whole).values())

    leaves = with_leaves(case.inputs())
    tails, pieces = {name: case.sequences(leaves[name]) for name in per_token}, []
    state = {name: leaves[name] for name in ("initial_state",) if name in leaves}
    for half, paradigm in zip(halves, paradigms[1:], strict=False):
        part = {
            name: half.segment([x[:n] for x, n in zip(xs, half.lengths, strict=True)]) for name, xs in tails.items()
        }
        tails = {name: [x[n:] for x, n in zip(xs, half.lengths, strict=True)] for name, xs in tails.items()}
        output, final_state = half.run(paradigm, leaves | part | state)
        state = {"initial_state": final_state}
        pieces.append(half.sequences(output))
    output = case.segment([torch.cat(parts) for parts in zip(*pieces, strict=True)])
    outputs = (output, state["initial_state"])
    actual = (*outputs, *gradients(outputs, case.cotangents(), leaves).values())
    for name, a, b in zip(("output", "state", *leaves), actual, expected, strict=True):
        exactly(a, b, name)


@pytest.mark.parametrize("kind", DECAYS)
def test_token_by_token_equals_the_whole(kind):
    case = Case(kind, [11, 11], resets=(4,) if kind in ("token", "key") else ())
    one = replace(case, lengths=[1, 1])
    results = []
    for tokens in (11, 1):
        leaves = with_leaves(case.inputs())
        state, outputs = {"initial_state": leaves["initial_state"]}, []
        for t in range(0, 11, tokens):
            per_token = {name: x[:, t : t + tokens] for name, x in leaves.items() if x.shape[:2] == (2, 11)}
            output, final_state = one.run(Paradigm.RECURRENT, leaves | per_token | state)
            state = {"initial_state": final_state}
            outputs.append(output)
        roots = torch.cat(outputs, dim=1), final_state
        results.append((*roots, *gradients(roots, case.cotangents(), leaves).values()))
    for actual, expected in zip(*results, strict=True):
        exactly(actual, expected)


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("kind", ["token", "key"])
@pytest.mark.parametrize("reset", [0, 3, 4, 15, 16, 19])
def test_a_reset_forgets_everything_before(paradigm, kind, reset):
    case = Case(kind, [20, 20], resets=(reset,), chunk_size=20 if reset > 8 else 4)
    inputs = case.inputs()
    leaves = with_leaves(inputs)
    output, state = case.run(paradigm, leaves)
    later = {name: x[:, reset:] for name, x in inputs.items() if name != "initial_state"}
    fresh, fresh_state = replace(case, lengths=[20 - reset] * 2).run(paradigm, later)
    exactly(output[:, reset:], fresh)
    exactly(state, fresh_state)
    grads = gradients((output[:, reset:], state), (torch.ones_like(fresh), torch.ones_like(state)), leaves)
    for name in INPUTS:
        before = grads[name] if name == "initial_state" else grads[name][:, :reset]
        exactly(before, torch.zeros_like(before), name)
    exactly(grads["log_decay"][:, reset], torch.zeros_like(grads["log_decay"][:, reset]))


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("kind", ["head", "token", "key"])
@pytest.mark.parametrize("has_state", [False, True])
def test_a_reset_at_every_token_leaves_each_token_alone(paradigm, kind, has_state):
    case = Case(kind, [9, 9], resets=tuple(range(9)), has_state=has_state)
    leaves = with_leaves(case.inputs())
    output, state = case.run(paradigm, leaves)
    q, k, v = (leaves[name] for name in "qkv")
    exactly(output, (q * k).sum(-1, keepdim=True) * v / math.sqrt(case.key_dim))
    exactly(state, k[:, -1, :, :, None] * v[:, -1, :, None, :])
    for gradient in gradients((output, state), case.cotangents(), leaves).values():
        assert gradient.isfinite().all()


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_gradients_are_numerical_ones(paradigm, kind, packed):
    case = Case(kind, [2, 0, 3] if packed else [5], packed=packed, n_heads=1, key_dim=2, chunk_size=2, strength=0.3)
    leaves = with_leaves(case.inputs())
    names = list(leaves)
    assert torch.autograd.gradcheck(
        lambda *xs: case.run(paradigm, dict(zip(names, xs, strict=True))), list(leaves.values())
    )


@pytest.mark.parametrize("paradigm", OPS)
def test_gradients_of_gradients_are_refused(paradigm):
    case = Case("head", [5])
    leaves = with_leaves(case.inputs())
    output, _ = case.run(paradigm, leaves)
    (gradient,) = torch.autograd.grad(output.square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(SeqmixError, match=f"decay_{paradigm} has no second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_forward_mode_is_right_or_refused(paradigm, name):
    case = Case("head", [5])
    inputs = case.inputs()

    def of_one_input(x):
        return case.run(paradigm, inputs | {name: x})

    x = inputs[name]
    if paradigm in OPS:
        with pytest.raises(SeqmixError, match=f"decay_{paradigm} has no forward-mode differentiation"):
            torch.func.jvp(of_one_input, (x,), (torch.ones_like(x),))
        return
    _, tangents = torch.func.jvp(of_one_input, (x,), (torch.ones_like(x),))
    _, expected = torch.func.jvp(lambda x: define(case, inputs | {name: x}), (x,), (torch.ones_like(x),))
    for tangent, expected_tangent in zip(tangents, expected, strict=True):
        exactly(tangent, expected_tangent)


def test_one_token_has_a_forward_mode():
    case = Case("head", [1])
    inputs = case.inputs()
    x = inputs["initial_state"]
    _, tangents = torch.func.jvp(
        lambda x: case.run(Paradigm.RECURRENT, inputs | {"initial_state": x}), (x,), (torch.ones_like(x),)
    )
    exactly(tangents[1], inputs["log_decay"].exp()[:, None, None].expand_as(tangents[1]))


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


# measured at most 1.2e-6, 4.3e-4, 3.4e-3; what is wide is as exact in all three, but for the parallel paradigm's
# gradient of log_decay, which comes through products of the inputs' dtype
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 6e-4), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_low_precision_stays_near_float64(paradigm, kind, dtype, tolerance):
    case = Case(kind, [96], key_dim=16, value_dim=24, strength=0.05, chunk_size=40, dtype=dtype)
    leaves = with_leaves(case.inputs())
    output, state = case.run(paradigm, leaves)
    actual = {"output": output, "state": state} | gradients((output, state), case.cotangents(), leaves)
    assert output.dtype == dtype
    assert state.dtype == torch.float32
    assert all(actual[name].dtype == x.dtype for name, x in leaves.items())
    exact = with_leaves({name: x.double() for name, x in leaves.items()})
    output, state = define(case, exact)
    cotangents = [x.double() for x in case.cotangents()]
    expected = {"output": output, "state": state} | gradients((output, state), cotangents, exact)
    wide = {"state", "initial_state"} | ({"log_decay"} if paradigm in OPS else set())
    for name in actual:
        assert relative_error(actual[name], expected[name]) <= (2e-6 if name in wide else tolerance), name


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("kind", DECAYS)
def test_a_state_is_not_rounded_to_the_inputs_dtype(paradigm, length, kind):
    case = Case(kind, [length], dtype=torch.bfloat16, strength=0.01)
    state = case.inputs()["initial_state"]
    inputs = {name: torch.zeros_like(x) for name, x in case.inputs().items()} | {"initial_state": state}
    _, final_state = case.run(paradigm, inputs)
    bit_for_bit(final_state, state)


@pytest.mark.parametrize("kind", ["head", "token", "key"])
@pytest.mark.parametrize(("paradigm", "length"), [*((p, 4096) for p in OPS), (Paradigm.PARALLEL, 512)])
def test_decays_that_underflow_are_finite_and_right(paradigm, length, kind):
    case = Case(kind, [length], n_heads=1, key_dim=2, strength=3.0, chunk_size=128, dtype=torch.float32)
    inputs = case.inputs()
    if kind != "head":
        inputs["log_decay"][:, length // 2 :] *= 1e30
    leaves = with_leaves(inputs)
    outputs = case.run(paradigm, leaves)
    grads = gradients(outputs, case.cotangents(), leaves)
    exact = with_leaves({name: x.double() for name, x in inputs.items()})
    expected = case.run(Paradigm.RECURRENT, exact)
    expected_grads = gradients(expected, [x.double() for x in case.cotangents()], exact)
    for actual, reference in zip(outputs, expected, strict=True):
        assert relative_error(actual, reference) <= 1e-5
    for name, gradient in grads.items():
        assert relative_error(gradient, expected_grads[name]) <= 1e-5 or not expected_grads[name].any(), name
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("strength", [0.05, 5.0, 20.0])
@pytest.mark.parametrize("kind", ["token", "key"])
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_gradients_of_strong_decays_are_exact_for_their_size(paradigm, kind, strength):
    """They are tiny, but an optimizer that divides by their size sees nothing else."""
    case = Case(kind, [128], key_dim=16, value_dim=24, chunk_size=48, dtype=torch.float32)
    inputs = case.inputs()
    inputs["log_decay"] = -strength * (0.9 + 0.2 * torch.sigmoid(inputs["log_decay"]))
    leaves = with_leaves(inputs, ["log_decay"])
    actual = gradients(case.run(paradigm, leaves), case.cotangents(), leaves)["log_decay"]
    exact = with_leaves({name: x.double() for name, x in inputs.items()}, ["log_decay"])
    cotangents = [x.double() for x in case.cotangents()]
    expected = gradients(define(case, exact), cotangents, exact)["log_decay"]
    errors = (actual - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)
    assert errors.max() <= 2e-5  # of each token; measured at most 3.5e-6


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("length", [1, 9])
def test_autocast_changes_nothing(paradigm, kind, length):
    case = Case(kind, [length], dtype=torch.float32)
    results = []
    for enabled in (False, True):
        leaves = with_leaves(case.inputs())
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = case.run(paradigm, leaves)
        results.append((*outputs, *gradients(outputs, case.cotangents(), leaves).values()))
    assert results[1][1].dtype == torch.float32
    for plain, autocast in zip(*results, strict=True):
        bit_for_bit(autocast, plain)


def arguments(case, inputs, *, known=False, save_states=True):
    """Arguments of a custom op; `known` gives it the borders as numbers too."""
    given = {name: inputs.get(name) for name in INPUTS} | {"beta": None, "cu_seqlens": case.borders}
    numbers = case.borders.tolist() if known and case.packed else None
    return Recurrence(
        **given,
        boundaries=numbers,
        scale=0.5,
        chunk_size=case.chunk_size,
        output_final_state=True,
        needs_grad=save_states,
    )


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("paradigm", OPS)
def test_the_ops_are_well_formed(paradigm, packed, kind):
    case = Case(kind, [2, 0, 5] if packed else [6, 6], packed=packed)
    op = getattr(torch.ops.seqmix, f"decay_{paradigm}").default
    backward_op = getattr(torch.ops.seqmix, f"decay_{paradigm}_backward").default
    inputs = with_leaves(case.inputs())
    compare = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments(case, inputs), test_utils=compare)
    torch.library.opcheck(op, arguments(case, inputs, known=True), test_utils=compare)
    # without an initial state the first entry state is nobody's, and must be the same numbers in two runs all the same
    torch.library.opcheck(op, arguments(case, inputs | {"initial_state": None}), test_utils=compare)
    inputs = with_leaves(inputs, ())
    torch.library.opcheck(op, arguments(case, inputs, save_states=False), test_utils=compare)
    *_, states = op(*arguments(case, inputs))
    # of q, k, v, log_decay, beta, initial_state and cu_seqlens
    wanted = [True, True, True, kind != "none", False, True, False]
    d_output, d_state = case.cotangents()
    for asked in (wanted, [False, True, *[False] * 5]):
        given = (d_output, d_state, *arguments(case, inputs), states, asked)
        torch.library.opcheck(backward_op, given, test_utils=compare)


@pytest.mark.parametrize(
    "case",
    [
        Case("head", [9, 9], has_state=False),
        Case("token", [9, 9], resets=(4,)),
        Case("key", [4, 0, 5], packed=True),
        Case("none", [4, 0, 5], packed=True, has_state=False),
        Case("head", [1, 1]),
    ],
    ids=["head", "token", "key packed", "none packed", "one token"],
)
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_compiles_into_one_graph_with_gradients(paradigm, case):
    torch._dynamo.reset()
    results = []
    for function in (decay_recurrence, torch.compile(decay_recurrence, fullgraph=True, backend="aot_eager")):
        leaves = with_leaves(case.inputs())
        q, k, v, a, state = (leaves.get(name) for name in INPUTS)
        outputs = tuple(function(q, k, v, a, initial_state=state, **case.options(paradigm)))
        results.append((*outputs, *gradients(outputs, case.cotangents(), leaves).values()))
    for eager, graph in zip(*results, strict=True):
        exactly(graph, eager)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_data_recompiles_nothing(paradigm):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decay_recurrence, fullgraph=True, backend=counter)

    def call(case):
        inputs = case.inputs()
        q, k, v, a, state = (inputs.get(name) for name in INPUTS)
        options = {"initial_state": state, **case.options(paradigm)}
        exactly(compiled(q, k, v, a, **options)[0], decay_recurrence(q, k, v, a, **options)[0])

    for seed, lengths in enumerate([[4, 5, 3], [0, 12, 0], [12, 0, 0], [1, 1, 10]]):
        call(Case("token", lengths, packed=True, resets=(seed,), seed=seed))
    assert counter.frame_count == 1
    for length in (13, 20, 33):
        call(Case("token", [0, 1, length], packed=True))
    assert counter.frame_count == 2


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_the_number_of_documents_recompiles_nothing(paradigm):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decay_recurrence, fullgraph=True, backend=counter, dynamic=True)
    for documents in (6, 7, 8, 9):  # none of which, plus one, is another size: a compiler takes equal ones for one
        lengths = [1] * (documents - 1) + [25 - documents]
        case = Case("token", lengths, packed=True, has_state=False)
        inputs = case.inputs()
        q, k, v, a = (inputs.get(name) for name in INPUTS[:4])
        exactly(
            compiled(q, k, v, a, **case.options(paradigm))[0],
            decay_recurrence(q, k, v, a, **case.options(paradigm))[0],
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize(("length", "chunk_size"), [(1, 4), (4, 4), (11, 4), (12, 4), (3, 8)])
@pytest.mark.parametrize("context", [0, 5])
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_flops_are_what_a_counter_counts(paradigm, context, length, chunk_size):
    case = Case("head", [length], n_heads=3, key_dim=4, value_dim=6, chunk_size=chunk_size, has_state=bool(context))
    inputs = case.inputs()
    q, k, v, a, state = (inputs.get(name) for name in INPUTS)

    counted = count_flops(
        lambda: decay_recurrence(q, k, v, a, initial_state=state, paradigm=paradigm, chunk_size=chunk_size)
    )
    # outer products are matrix products, done as elementwise ones
    outer = length * 2 * 4 * 6 if paradigm is Paradigm.RECURRENT else 0
    expected = decay_flops(paradigm, length, 4, 6, chunk_size=chunk_size, context=context)
    assert counted == 3 * (expected - outer)


class Results(TorchDispatchMode):
    """Keeps what the family's ops return."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "seqmix":
            self.seen.append(result)
        return result


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("paradigm", OPS)
def test_states_for_a_backward_pass_are_kept_only_if_there_is_one(paradigm, packed):
    case = Case("head", [4, 5] if packed else [9, 9], packed=packed)
    for names, grad_mode, kept in [((), True, False), (INPUTS, False, False), (["initial_state"], True, True)]:
        with torch.set_grad_enabled(grad_mode), Results() as results:
            case.run(paradigm, with_leaves(case.inputs(), names))
        ((_, _, states),) = results.seen
        assert bool(states.numel()) is kept


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("paradigm", OPS)
def test_memory_for_the_backward_pass_is_linear(paradigm, kind):
    def saved_bytes(length):
        seen = {}

        def pack(x):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            case = Case(kind, [length], key_dim=8, value_dim=8, chunk_size=16)
            case.run(paradigm, with_leaves(case.inputs()))
        return sum(seen.values())

    assert saved_bytes(512) <= 2.01 * saved_bytes(256)


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_the_future_changes_nothing(paradigm, kind):
    case = Case(kind, [20, 20], chunk_size=8)
    output, _ = case.run(paradigm, case.inputs())
    for cut in (1, 8, 13, 17):
        changed = {
            name: torch.cat((x[:, :cut], 1e3 * x[:, cut:]), dim=1) if x.shape[:2] == (2, 20) else x
            for name, x in case.inputs().items()
        }
        again, _ = case.run(paradigm, changed)
        assert_close(again[:, :cut], output[:, :cut], rtol=0, atol=1e-12)


def make(batch_size=2, length=6, n_heads=2, key_dim=4, value_dim=3):
    return (
        torch.randn(batch_size, length, n_heads, key_dim),
        torch.randn(batch_size, length, n_heads, key_dim),
        torch.randn(batch_size, length, n_heads, value_dim),
    )


Q, K, V = make()


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize(
    ("tensors", "options", "sentence"),
    [
        ((Q[0], K[0], V[0]), {}, r"q and k must be \[B T H K\] .* \[6, 2, 4\], \[6, 2, 4\], \[6, 2, 3\]"),
        ((Q, K[..., :3], V), {}, r"given are \[2, 6, 2, 4\], \[2, 6, 2, 3\]"),
        ((Q, K, V[:, :5]), {}, r"\[2, 5, 2, 3\]"),
        ((Q, K, V[:, :, :1]), {}, r"\[2, 6, 1, 3\]"),
        ((Q[:, :0], K[:, :0], V[:, :0]), {}, "with T >= 1"),
        ((Q, K, V, torch.zeros(3)), {}, r"B, T, H, K = 2, 6, 2, 4; given is \[3\]"),
        ((Q, K, V, torch.zeros(6, 2)), {}, r"given is \[6, 2\]"),
        ((Q, K, V, torch.zeros(1, 6, 2)), {}, r"given is \[1, 6, 2\]"),
        ((Q, K, V, torch.zeros(2, 6, 2, 3)), {}, r"given is \[2, 6, 2, 3\]"),
        ((Q, K, V), {"cu_seqlens": torch.tensor([0, 6])}, "packed documents are one row .* the batch is 2"),
        ((Q, K, V), {"initial_state": torch.zeros(1, 2, 4, 3)}, r"must be \[2, 2, 4, 3\], and is \[1, 2, 4, 3\]"),
        ((Q, K, V), {"initial_state": torch.zeros(2, 2, 3, 4)}, r"must be \[2, 2, 4, 3\], and is \[2, 2, 3, 4\]"),
        (
            (Q[:1], K[:1], V[:1]),
            {"initial_state": torch.zeros(1, 2, 4, 3), "cu_seqlens": torch.tensor([0, 2, 6])},
            r"must be \[2, 2, 4, 3\], and is \[1, 2, 4, 3\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(paradigm, tensors, options, sentence):
    with pytest.raises(SeqmixError, match=sentence) as error:
        decay_recurrence(*tensors, paradigm=paradigm, **options)
    assert "\n" not in str(error.value)


def test_there_is_no_other_paradigm():
    with pytest.raises(SeqmixError, match=r"there is no paradigm 'chunckwise'; .* did you mean .chunkwise"):
        decay_recurrence(Q, K, V, paradigm="chunckwise")
    by_name = decay_recurrence(Q, K, V, paradigm="chunkwise").output
    bit_for_bit(by_name, decay_recurrence(Q, K, V, paradigm=Paradigm.CHUNKWISE).output)


def test_chunks_hold_at_least_a_token():
    with pytest.raises(SeqmixError, match="chunk_size must be at least 1, and is 0"):
        decay_recurrence(Q, K, V, chunk_size=0)


@pytest.mark.parametrize("borders", [[0, 5], [1, 6], [0, 4, 2, 6], [0, 7], [0], []], ids=str)
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_wrong_borders_are_refused(paradigm, borders):
    with pytest.raises(SeqmixError, match="must rise from 0 to the 6 tokens given"):
        decay_recurrence(Q[:1], K[:1], V[:1], cu_seqlens=torch.tensor(borders, dtype=torch.int64), paradigm=paradigm)


@pytest.mark.parametrize("borders", [[0, 4], [1, 6], [0, 4, 3, 6]])
def test_wrong_borders_are_refused_in_compiled_code_too(borders):
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 1, 6, 2, 4)
    function = torch.compile(decay_recurrence, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0"):
        function(q, k, v, None, cu_seqlens=torch.tensor(borders), paradigm="parallel")


@pytest.mark.parametrize("widths", [(1, 6), (4, 6), (4, 1), (1, 1)])
@pytest.mark.parametrize("heads", [1, 2])
def test_the_state_of_a_step_lies_as_the_one_before(heads, widths):
    """A compiled step takes another layout for another input, even of an axis of one."""
    q, k, v = (torch.randn(2, 1, heads, width) for width in (widths[0], *widths))
    state = torch.randn(2, heads, *widths)
    for log_decay in (None, torch.full((heads,), -0.1), torch.full((2, 1, heads), -0.1)):
        _, after = decay_recurrence(
            q, k, v, log_decay, initial_state=state, output_final_state=True, paradigm="recurrent"
        )
        assert after.stride() == state.stride()
