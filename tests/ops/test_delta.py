"""The delta family against its definition, token by token: both paradigms, every decay, state, packing, all gradients.

Cases in their breadth, 16 bits and the ops' forms are drawn by the kernel checks (test_kernels.py).
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from seqmix.ops.delta import delta_flops, delta_rule, unit_norm
from seqmix.ops.paradigm import Paradigm
from seqmix.ops.recurrence import Recurrence
from seqmix.registry import SeqmixError
from seqmix.testing.counting import count_flops

PARADIGMS = [Paradigm.RECURRENT, Paradigm.CHUNKWISE]
DECAYS = ["none", "head", "token"]
"""log_decay None, [H], [B T H]."""
INPUTS = ["q", "k", "v", "beta", "log_decay", "initial_state"]
every_paradigm = pytest.mark.parametrize("paradigm", PARADIGMS)
every_decay = pytest.mark.parametrize("kind", DECAYS)


def exactly(actual, expected, name=""):
    assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")


@dataclass(frozen=True)
class Case:
    """One call; with borders its sequences are packed documents, else rows of a batch."""

    kind: str
    length: int
    borders: tuple[int, ...] | None = None
    n_heads: int = 2
    key_dim: int = 3
    value_dim: int = 2
    has_state: bool = True
    resets: tuple[int, ...] = ()
    chunk_size: int = 4
    dtype: torch.dtype = torch.float64

    def inputs(self):
        """Arguments by name; keys have norm 1, betas lie from 0 to 2, both ends included."""
        randn = partial(torch.randn, generator=torch.Generator().manual_seed(self.length), dtype=torch.float64)
        shape = (2 if self.borders is None else 1, self.length, self.n_heads)
        wide = torch.promote_types(self.dtype, torch.float32)
        inputs = {name: randn(*shape, self.key_dim) for name in "qk"} | {"v": randn(*shape, self.value_dim)}
        inputs["k"] = F.normalize(inputs["k"], dim=-1)
        inputs = {name: x.to(self.dtype) for name, x in inputs.items()}
        inputs["beta"] = (1 + randn(*shape)).clamp(0, 2).to(wide)
        if self.kind != "none":
            a = -0.3 * randn(*(shape if self.kind == "token" else shape[2:])).abs()
            if self.resets:
                a[:, list(self.resets)] = -math.inf
            inputs["log_decay"] = a.to(wide)
        if self.has_state:
            rows = 2 if self.borders is None else len(self.borders) - 1
            inputs["initial_state"] = randn(rows, self.n_heads, self.key_dim, self.value_dim).to(wide)
        return inputs

    def run(self, paradigm, inputs, function=delta_rule):
        """Output and final state."""
        borders = None if self.borders is None else torch.tensor(self.borders)
        q, k, v, beta, log_decay, state = (inputs.get(name) for name in INPUTS)
        options = {"initial_state": state, "output_final_state": True, "cu_seqlens": borders}
        how = {"paradigm": paradigm, "chunk_size": self.chunk_size}
        return tuple(function(q, k, v, beta, log_decay, scale=0.7, **options, **how))


def define(case, inputs):
    """Output and final state by S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T with its matrices."""
    q, k, v, beta, log_decay, states = (inputs.get(name) for name in INPUTS)
    outputs, final_states = [], []
    for n, (start, stop) in enumerate(pairwise(case.borders or (0, case.length))):
        rows = slice(None) if case.borders is None else slice(n, n + 1)
        state = v.new_zeros(len(q), case.n_heads, case.key_dim, case.value_dim) if states is None else states[rows]
        for t in range(start, stop):
            key, b = k[:, t, :, :, None], beta[:, t, :, None, None]
            transition = torch.eye(case.key_dim) - b * key * key.mT
            if log_decay is not None:
                a = log_decay if log_decay.ndim == 1 else log_decay[:, t]
                transition = a.exp()[..., None, None] * transition
            state = transition @ state + b * key * v[:, t, :, None]
            outputs.append(0.7 * (q[:, t, :, None] @ state)[:, :, 0])
        final_states.append(state)
    return torch.stack(outputs, 1), torch.cat(final_states)


def leaves(inputs, names=tuple(INPUTS)):
    return {name: x.detach().requires_grad_(name in names) for name, x in inputs.items()}


def with_gradients(function, inputs):
    """Output, final state and the gradients of all inputs, by name."""
    inputs = leaves(inputs)
    outputs = function(inputs)
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream = [randn(x.shape).to(x.dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), upstream)
    return dict(zip(["output", "state", *inputs], [*outputs, *gradients], strict=True))


CASES = {
    "batch": Case("none", 17),
    "no state": Case("none", 17, has_state=False),
    "whole chunks": Case("none", 12),
    "one token": Case("none", 1),
    "packed": Case("none", 17, borders=(0, 5, 5, 6, 17)),
    "packed without state": Case("none", 17, borders=(0, 8, 17), has_state=False),
    "one key dimension": Case("none", 17, key_dim=1),
    "more than a block": Case("none", 130, n_heads=1, chunk_size=48),
    "more than a block, packed": Case("none", 133, borders=(0, 63, 63, 133), n_heads=1, chunk_size=64),
}


@pytest.mark.parametrize("name", CASES)
@every_decay
def test_output_state_and_gradients_are_the_definition(kind, name):
    case = replace(CASES[name], kind=kind, resets=(2, 3) if kind == "token" and CASES[name].length > 3 else ())
    expected = with_gradients(partial(define, case), case.inputs())
    for paradigm in PARADIGMS:
        actual = with_gradients(partial(case.run, paradigm), case.inputs())
        for what, value in expected.items():
            exactly(actual[what], value, f"{paradigm} {what}")


@every_paradigm
def test_an_example_by_hand(paradigm):
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
    q, k, v, beta, _, _ = (Case("none", 9, has_state=False).inputs().get(name) for name in INPUTS)
    q, k, v, b = (x.transpose(1, 2) for x in (q, k, v, beta[..., None]))
    written = torch.linalg.inv(torch.eye(9) + (b * k @ k.mT).tril(-1)) @ (b * v)
    expected = 0.7 * ((q @ k.mT).tril() @ written).transpose(1, 2)
    exactly(delta_rule(*Case("none", 9, has_state=False).inputs().values(), None, scale=0.7)[0], expected)


@every_paradigm
@pytest.mark.parametrize("reset", [0, 3, 4, 15])
def test_a_reset_forgets_everything_before(paradigm, reset):
    case = Case("token", 20, resets=(reset,), chunk_size=20 if reset > 8 else 4)
    inputs = leaves(case.inputs())
    output, state = case.run(paradigm, inputs)
    later = {name: x[:, reset:] for name, x in inputs.items() if name != "initial_state"}
    fresh, fresh_state = replace(case, length=20 - reset).run(paradigm, later)
    exactly(output[:, reset:], fresh)
    exactly(state, fresh_state)
    gradients = torch.autograd.grad(output[:, reset:].sum(), list(inputs.values()))
    for name, gradient in zip(inputs, gradients, strict=True):
        before = gradient if name == "initial_state" else gradient[:, :reset]
        exactly(before, torch.zeros_like(before), name)


@every_paradigm
def test_zeros_and_resets_everywhere_are_finite(paradigm):
    case = Case("token", 9, resets=tuple(range(9)))
    results = with_gradients(partial(case.run, paradigm), case.inputs())
    zeros = with_gradients(partial(case.run, paradigm), {n: torch.zeros_like(x) for n, x in case.inputs().items()})
    assert all(x.isfinite().all() for x in (*results.values(), *zeros.values()))


@every_paradigm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_one_direction_are_well_behaved(paradigm, dtype):
    # the hardest triangular system: every key the same, and every transition a reflection
    case = Case("none", 1000, key_dim=4, chunk_size=64, dtype=dtype)
    inputs = case.inputs() | {"beta": torch.full((2, 1000, 2), 2.0)}
    inputs["k"] = torch.full_like(inputs["k"], 0.5)
    exact = replace(case, dtype=torch.float64).run(Paradigm.RECURRENT, {n: x.double() for n, x in inputs.items()})
    for actual, expected in zip(case.run(paradigm, inputs), exact, strict=True):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error <= (1e-4 if dtype == torch.float32 or actual.dtype == torch.float32 else 3e-3)


@every_paradigm
@pytest.mark.parametrize("length", [1, 9])
def test_autocast_changes_nothing(paradigm, length):
    case = Case("token", length, dtype=torch.float32)
    plain = case.run(paradigm, case.inputs())
    with torch.autocast("cpu", torch.bfloat16):
        cast = case.run(paradigm, case.inputs())
    assert_close(cast, plain, rtol=0, atol=0)


@every_paradigm
@every_decay
def test_gradients_are_numerical_ones(paradigm, kind):
    case = Case(kind, 5, borders=(0, 2, 2, 5), n_heads=1, key_dim=2, chunk_size=2)
    inputs = leaves(case.inputs())
    names = list(inputs)
    assert torch.autograd.gradcheck(
        lambda *xs: case.run(paradigm, dict(zip(names, xs, strict=True))), list(inputs.values())
    )


@every_paradigm
def test_gradients_of_gradients_and_tangents_are_refused(paradigm):
    case = Case("head", 5)
    inputs = leaves(case.inputs())
    (gradient,) = torch.autograd.grad(case.run(paradigm, inputs)[0].square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(SeqmixError, match=f"delta_{paradigm} has no second derivatives"):
        gradient.sum().backward()
    inputs, beta = case.inputs(), case.inputs()["beta"]
    with pytest.raises(SeqmixError, match=f"delta_{paradigm} has no forward-mode differentiation"):
        torch.func.jvp(lambda x: case.run(paradigm, inputs | {"beta": x}), (beta,), (torch.ones_like(beta),))


@pytest.mark.parametrize("name", ["batch", "no state", "packed", "one token"])
@every_paradigm
def test_compiles_into_one_graph_with_gradients(paradigm, name):
    torch._dynamo.reset()
    case = replace(CASES[name], kind="token")
    function = torch.compile(delta_rule, fullgraph=True, backend="aot_eager")
    expected = with_gradients(partial(case.run, paradigm), case.inputs())
    for what, value in with_gradients(partial(case.run, paradigm, function=function), case.inputs()).items():
        exactly(value, expected[what], what)


@every_paradigm
def test_data_recompiles_nothing(paradigm):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(delta_rule, fullgraph=True, backend=counter)

    def call(length, borders):
        q, k, v, beta, a, state = (Case("token", length, borders).inputs().get(name) for name in INPUTS)
        options = {"initial_state": state, "cu_seqlens": torch.tensor(borders), "chunk_size": 4, "paradigm": paradigm}
        exactly(compiled(q, k, v, beta, a, **options)[0], delta_rule(q, k, v, beta, a, **options)[0])

    for borders in ((0, 4, 9, 12), (0, 0, 12, 12), (0, 12, 12, 12)):
        call(12, borders)
    assert counter.frame_count == 1
    for length in (13, 20, 33):
        call(length, (0, 0, 1, length))
    assert counter.frame_count == 2


@every_paradigm
def test_the_number_of_documents_recompiles_nothing(paradigm):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(delta_rule, fullgraph=True, backend=counter, dynamic=True)
    for documents in (6, 7, 8, 9):  # none of which, plus one, is another size: a compiler takes equal ones for one
        borders = (*range(documents), 24)
        q, k, v, beta, a = (Case("token", 24, borders).inputs().get(name) for name in INPUTS[:5])
        options = {"cu_seqlens": torch.tensor(borders), "chunk_size": 4, "paradigm": paradigm}
        exactly(compiled(q, k, v, beta, a, **options)[0], delta_rule(q, k, v, beta, a, **options)[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize(("length", "chunk_size"), [(1, 4), (4, 4), (11, 4), (12, 4), (3, 8)])
@pytest.mark.parametrize("context", [0, 5])
@every_paradigm
def test_flops_are_what_a_counter_counts(paradigm, context, length, chunk_size):
    case = Case("head", length, n_heads=3, key_dim=4, value_dim=6, has_state=bool(context))
    q, k, v, beta, a, state = (case.inputs().get(name) for name in INPUTS)
    counted = count_flops(
        lambda: delta_rule(q, k, v, beta, a, initial_state=state, chunk_size=chunk_size, paradigm=paradigm)
    ) // (2 * 3)  # rows and heads
    declared = delta_flops(paradigm, length, 4, 6, chunk_size=chunk_size, context=context)
    if paradigm is Paradigm.CHUNKWISE:
        assert counted == declared
        return
    # outer products are done as elementwise ones; the loop reads a state of zeros too
    reads = length if context or length > 1 else 0
    assert counted == (length + reads) * 2 * 4 * 6
    assert declared == counted + (length - (reads > 0 and not context)) * 2 * 4 * 6


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


@every_paradigm
def test_states_for_a_backward_pass_are_kept_only_if_there_is_one_and_are_linear(paradigm):
    for names, grad_mode, kept in [((), True, False), (INPUTS, False, False), (["beta"], True, True)]:
        sizes = []
        for length in (256, 512):
            with torch.set_grad_enabled(grad_mode), Results() as results:
                case = Case("head", length, chunk_size=16)
                case.run(paradigm, leaves(case.inputs(), names))
            ((_, _, states),) = results.seen
            sizes.append(states.numel())
        assert sizes[1] == 2 * sizes[0]
        assert bool(sizes[0]) is kept


def test_the_ops_are_well_formed():
    compare = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for borders in (None, (0, 2, 2, 7)):
        case = Case("token", 7, borders)
        call = Recurrence(
            **leaves(case.inputs()),
            cu_seqlens=None if borders is None else torch.tensor(borders),
            boundaries=None,
            scale=0.5,
            chunk_size=4,
            output_final_state=True,
            needs_grad=True,
        )
        for op in (torch.ops.seqmix.delta_recurrent.default, torch.ops.seqmix.delta_chunkwise.default):
            torch.library.opcheck(op, call, test_utils=compare)
            torch.library.opcheck(op, call._replace(boundaries=borders and list(borders)), test_utils=compare)


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


Q, K, V, B = torch.randn(2, 6, 2, 4), torch.randn(2, 6, 2, 4), torch.randn(2, 6, 2, 3), torch.rand(2, 6, 2)
STATE = torch.zeros(2, 2, 4, 3)


@every_paradigm
@pytest.mark.parametrize(
    ("tensors", "options", "sentence"),
    [
        ((Q[0], K[0], V[0], B, None), {}, r"q and k must be \[B T H K\] .* \[6, 2, 4\], \[6, 2, 4\], \[6, 2, 3\]"),
        ((Q, K[..., :3], V, B, None), {}, r"given are \[2, 6, 2, 4\], \[2, 6, 2, 3\]"),
        ((Q[:, :0], K[:, :0], V[:, :0], B[:, :0], None), {}, "with T >= 1"),
        ((Q.long(), K.long(), V.long(), B, None), {}, "given are int64, int64, int64"),
        ((Q, K, V, B[..., None], None), {}, r"B, T, H = 2, 6, 2; given is \[2, 6, 2, 1\] of float32"),
        ((Q, K, V, B.long(), None), {}, r"beta must be floats .* of int64"),
        ((Q, K, V, B, torch.zeros(3)), {}, r"B, T, H, K = 2, 6, 2, 4; given is \[3\]"),
        ((Q, K, V, B, torch.zeros(2, 6, 2, 4)), {}, r"None, \[H\] or \[B T H\] .* given is \[2, 6, 2, 4\]"),
        ((Q, K, V, B, None), {"cu_seqlens": torch.tensor([0, 6])}, "packed documents are one row .* the batch is 2"),
        ((Q, K, V, B, None), {"initial_state": STATE.mT}, r"must be \[2, 2, 4, 3\], and is \[2, 2, 3, 4\]"),
        ((Q[:1], K[:1], V[:1], B[:1], None), {"cu_seqlens": torch.tensor([0, 7])}, "must rise from 0 to the 6"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(paradigm, tensors, options, sentence):
    with pytest.raises(SeqmixError, match=sentence) as error:
        delta_rule(*tensors, paradigm=paradigm, **options)
    assert "\n" not in str(error.value)


def test_what_there_is_not_is_refused():
    with pytest.raises(SeqmixError, match="the delta rule has no parallel paradigm; it has chunkwise, recurrent"):
        delta_rule(Q, K, V, B, paradigm=Paradigm.PARALLEL)
    with pytest.raises(SeqmixError, match="the delta rule has no parallel paradigm"):
        delta_flops(Paradigm.PARALLEL, 4, 2, 2)
    with pytest.raises(SeqmixError, match="chunk_size must be at least 1, and is 0"):
        delta_rule(Q, K, V, B, chunk_size=0)
