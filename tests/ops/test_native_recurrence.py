"""Native kernels with matrix states: results are bitwise independent of threads, other rows and the split of heads.

test_kernels.py tests their results, with those of all kernels.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from seqmix import build_model, load_config
from seqmix.mixers import Paradigm
from seqmix.ops.decay import decay, decay_reading_values
from seqmix.ops.delta import delta, delta_product
from seqmix.ops.dplr import dplr
from seqmix.ops.kernels.native import build
from seqmix.ops.runtime.call import Call

pytestmark = pytest.mark.skipif(build.failure("recurrence") is not None, reason="there is no C++ compiler")

OPS = ("decay", "delta", "dplr", "dplr with b", "shared keys")
every_op = pytest.mark.parametrize("name", OPS)
every_read = pytest.mark.parametrize("name", [*OPS, "reading values"])


def op_of(name, batch, length, heads=2, key_width=20, value_width=72):
    """An op on random inputs: its function, the inputs by name, and the final states' shape."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(batch, length, *shape, generator=generator)

    keys = {name: F.normalize(random(heads, key_width), dim=-1) for name in "qkab"}
    groups = 1 if name == "shared keys" else heads
    inputs = {"q": keys["q"][:, :, :groups], "k": keys["k"][:, :, :groups], "v": random(heads, value_width)}
    if name == "delta":
        inputs |= {"beta": random(heads).sigmoid(), "log_decay": -random(heads).abs()}
    elif name in ("decay", "reading values"):
        inputs |= {"log_decay": -random(heads, key_width).abs()}
        inputs |= {"q": random(heads, value_width)} if name == "reading values" else {}
    elif name == "shared keys":
        inputs |= {"log_decay": -random(heads).abs()}
    else:
        rate = random(heads, 1).sigmoid()
        inputs |= {"a": keys["a"], "log_decay": -random(heads, key_width).abs()}
        inputs |= {"b": -rate * keys["a"]} if name == "dplr with b" else {"k": rate * keys["a"]}
    functions = {"delta": delta, "decay": decay, "shared keys": decay, "reading values": decay_reading_values}
    function = functions.get(name, dplr)
    return function, inputs, (heads, key_width, value_width)


def run(function, inputs, states, **options):
    """Output, final state, and the gradients of all inputs and of the initial states."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in (inputs | {"initial_state": states}).items()}
    options = {"backend": "native"} | options
    output, final = function(**leaves, output_final_state=True, **options)
    loss = output.square().sum() + final.square().sum()
    return [output, final, *torch.autograd.grad(loss, list(leaves.values()))]


def step(function, token, state, *, donated=False, **options):
    """Output and state of one token without gradients, as in decoding."""
    call = Call(paradigm=Paradigm.RECURRENT, state=state, return_state=True, donated=donated, **options)
    with torch.no_grad():
        return function(**token, call=call)


@every_read
@pytest.mark.parametrize(("batch", "heads"), [(3, 2), (1, 1)])
def test_thread_count_leaves_results_bitwise_unchanged(name, batch, heads):
    function, inputs, state = op_of(name, batch, 150, heads)
    states = torch.randn(batch, *state)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(run(function, inputs, states))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@every_read
def test_row_and_packed_document_match_each_computed_alone(name):
    function, inputs, state = op_of(name, 3, 100)
    states = torch.randn(3, *state)
    whole = run(function, inputs, states)
    for n in range(3):
        alone = run(function, {name: x[n : n + 1] for name, x in inputs.items()}, states[n : n + 1])
        assert all(torch.equal(x[n : n + 1], y) for x, y in zip(whole, alone, strict=True))
    boundaries = [0, *itertools.accumulate((70, 0, 30))]
    packed = {name: x[:1] for name, x in inputs.items()}
    whole = run(function, packed, states, cu_seqlens=torch.tensor(boundaries))
    for n, (start, stop) in enumerate(itertools.pairwise(boundaries)):
        if stop > start:
            alone = run(function, {name: x[:, start:stop] for name, x in packed.items()}, states[n : n + 1])
            parts = [x[n : n + 1] if x.shape[0] == 3 else x[:, start:stop] for x in whole]
            assert all(map(torch.equal, parts, alone))


@every_op
def test_nan_stays_in_its_row_and_head(name):
    function, inputs, state = op_of(name, 2, 70)
    inputs["v"][0, 3, 0, 5] = torch.nan
    output, final, *_ = run(function, inputs, torch.zeros(2, *state))
    assert output[0, 3:, 0, 5].isnan().all()
    assert final[0, 0, :, 5].isnan().all()
    for x, (row, head, column) in ((output.transpose(1, 2), (0, 0, 5)), (final, (0, 0, 5))):
        x[row, head, ..., column] = 0
        assert x.isfinite().all()


@pytest.mark.parametrize("name", ["dplr", "dplr with b"])
@pytest.mark.parametrize("length", [70, 1])
def test_native_kernels_accept_float32_a_and_b_with_bfloat16_queries(name, length):
    function, inputs, state = op_of(name, 2, length)
    narrow = {key: x.bfloat16() if key in "qkv" else x for key, x in inputs.items()}  # a and b stay float32
    states = torch.randn(2, *state)
    expected = run(function, narrow, states, backend="reference", paradigm=Paradigm.RECURRENT)
    results = run(function, narrow, states)
    if length == 1:
        results = step(function, narrow, states, backend="native")
    for x, y in zip(results, expected, strict=False):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x.float(), y.float(), rtol=2e-2, atol=2e-2)


def test_native_delta_product_matches_the_reference():
    _, inputs, state = op_of("delta", 2, 60)
    inputs |= {"q": inputs["q"][:, ::2], "log_decay": inputs["log_decay"][:, ::2]}
    states = torch.randn(2, *state)
    native = run(delta_product, inputs, states)
    for x, y in zip(native, run(delta_product, inputs, states, backend="reference"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("chunkwise", "native"), ("recurrent", "native"), ("recurrent", "reference"), ("steps", "native")],
)
@pytest.mark.parametrize("name", ["decay", "delta"])
def test_slow_decays_do_not_drift(name, kind, backend):
    length, rate = 2**13, 1.234e-4
    function, inputs, state = op_of(name, 1, length, 1, 4, 8)
    inputs |= {"v": inputs["v"] + 1, "log_decay": torch.full_like(inputs["log_decay"], -rate)}
    if name == "delta":
        inputs["beta"] = rate * inputs["beta"]
    exact = {name: x.double() for name, x in inputs.items()}
    expected = run(function, exact, torch.zeros(1, *state).double(), backend="reference")
    if kind == "steps":
        expected = expected[:2]
        outputs, final = [], torch.zeros(1, *state)
        for t in range(length):
            token = {name: x[:, t : t + 1] for name, x in inputs.items()}
            output, final = step(function, token, final, backend=backend)
            outputs.append(output)
        results = torch.cat(outputs, 1), final
    else:
        results = run(function, inputs, torch.zeros(1, *state), paradigm=kind, backend=backend)
    for x, y in zip(results, expected, strict=True):
        assert (x.double() - y).norm() <= 1e-5 * y.norm()


@pytest.mark.parametrize(
    ("preset", "backend"),
    [
        ("delta-net", "native"),
        ("rwkv7", "native"),
        ("gla", "native"),
        ("mamba2", "native"),
        ("retnet", "native (recurrent)"),
    ],
)
def test_models_on_a_cpu_use_native_kernels_where_faster(preset, backend):
    model = build_model(load_config(f"{preset}-tiny", ["model.n_layers=1"]).model)
    assert list(model.backends.values()) == [backend]


def test_native_op_trains_compiled_and_checkpointed():
    """Compilation gives one graph and the same results as eager mode."""
    function, inputs, state = op_of("delta", 1, 70)

    def loss(states, **tensors):
        output, final = function(**tensors, initial_state=states, output_final_state=True, backend="native")
        return output.square().sum() + final.square().sum()

    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    states = torch.randn(1, *state, requires_grad=True)
    wanted = [*leaves.values(), states]
    expected = torch.autograd.grad(loss(states, **leaves), wanted)
    checkpointed = checkpoint(loss, states, use_reentrant=False, **leaves)
    assert all(map(torch.equal, torch.autograd.grad(checkpointed, wanted), expected))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, torch.autograd.grad(compiled(states, **leaves), wanted), expected))


@pytest.mark.parametrize("donated", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize(("heads", "keys", "values"), [(1, 5, 3), (2, 16, 64), (3, 13, 77)])
@every_read
def test_native_single_token_step_matches_the_reference(name, heads, keys, values, dtype, tolerance, donated):
    function, inputs, state = op_of(name, 3, 1, heads, keys, values)
    inputs = {name: x if name == "log_decay" else x.to(dtype) for name, x in inputs.items()}
    before = torch.randn(3, *state)
    kept = before.clone()
    expected, results = (
        step(function, inputs, states, backend=backend, donated=donated)
        for backend, states in (("reference", before.clone()), ("native", kept))
    )
    for x, y in zip(results, expected, strict=True):
        assert x.dtype == y.dtype
        assert (x - y).norm() <= tolerance * y.norm()
    assert (results[1].data_ptr() == kept.data_ptr()) == donated
    assert donated or torch.equal(kept, before)
