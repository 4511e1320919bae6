"""Linear layers by oneDNN and the native kernel match torch's results and gradients."""

import pickle
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded_operations import Watched
from torch import nn
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from seqmix import load_config
from seqmix.models import build_model
from seqmix.models import cpu_linear as module
from seqmix.models.compiling import compiled_for, rows_as_sums
from seqmix.models.cpu_linear import Linear, linear, onednn_linear, use_fast_linear
from seqmix.models.speculation import verify
from seqmix.ops.kernels.native import build
from seqmix.ops.kernels.native import linear as kernel

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    # every product is large enough, on every machine
    monkeypatch.setattr(module, "MIN_MULTIPLICATIONS", 0)
    monkeypatch.setattr(module, "USE_ONEDNN", True)


def asked(call):
    """How many products oneDNN computes."""
    with Watched() as watched:
        call()
    return sum(op is torch.ops.seqmix.linear.default for op, _ in watched.seen)


def random(*shape, seed=0, **options):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(options.pop("dtype", torch.float32)).requires_grad_(options.pop("requires_grad", True))


LAYOUTS = {
    "contiguous": lambda x: x,
    "column by column": lambda x: x.mT.contiguous().mT,
    "a part": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@settings(deadline=None)
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    width=st.integers(1, 40),
    outputs=st.integers(1, 40),
    layouts=st.tuples(st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS))),
    bias=st.booleans(),
)
def test_results_and_gradients_match_torch(rows, width, outputs, layouts, bias):
    x, weight = random(*rows, width), random(outputs, width, seed=1)
    added = random(outputs, seed=2) if bias else None
    given = [tensor for tensor in (x, weight, added) if tensor is not None]
    with torch.no_grad():
        for tensor in given:
            tensor.mul_(2).round_()  # sums of small integers are exact in any order
    operands = [LAYOUTS[layout](tensor) for layout, tensor in zip(layouts, (x, weight), strict=True)]
    upstream = random(*rows, outputs, seed=3, requires_grad=False).mul(2).round()
    results = []
    for function in (linear, F.linear):
        output = function(*operands, added)
        results.append((output, *torch.autograd.grad(output, given, upstream, retain_graph=True)))
    assert_close(*results, rtol=0, atol=0)
    assert results[0][0].is_contiguous()


def test_onednn_linear_passes_opcheck():
    for x in (random(2, 5, 8), random(5, 8), random(8, 5).detach().T):
        torch.library.opcheck(onednn_linear, (x, random(3, 8, seed=1)))


@pytest.mark.parametrize("shape", [(5, 8), (8,)])
def test_second_order_gradients_match_torch(shape):
    x, weight = random(*shape), random(3, 8, seed=1)
    results = []
    for function in (linear, F.linear):
        first = torch.autograd.grad(function(x, weight).exp().sum(), (x, weight), create_graph=True)
        results.append((*first, *torch.autograd.grad(sum(part.square().sum() for part in first), (x, weight))))
    assert_close(*results, rtol=1e-4, atol=1e-4)


def by_both(monkeypatch, function):
    """A function's results by oneDNN's products, and by torch's."""
    results = []
    for faster in (True, False):
        monkeypatch.setattr(module, "USE_ONEDNN", faster)
        results.append(function())
    return results


def test_function_transforms_match_torch(monkeypatch):
    x, weight = random(5, 8, requires_grad=False), random(3, 8, seed=1, requires_grad=False)

    def loss(weight, x):
        return linear(x, weight).exp().sum()

    transformed = {
        "hessian": lambda: torch.func.hessian(loss)(weight, x[:2]),
        "jvp of grad": lambda: torch.func.jvp(lambda w: torch.func.grad(loss)(w, x), (weight,), (weight,)),
        "grads of rows": lambda: torch.vmap(torch.func.grad(loss), (None, 0))(weight, x[:, None]),
        "jvp of vmap": lambda: torch.func.jvp(torch.vmap(lambda row: linear(row[None], weight)), (x,), (x,)),
    }
    for function in transformed.values():
        assert_close(*by_both(monkeypatch, function))


@pytest.mark.parametrize("create_graph", [False, True])
def test_forward_mode_tangent_of_later_layer_reaches_gradient(monkeypatch, create_graph):
    x, first, last = random(5, 8, requires_grad=False), random(6, 8, seed=1), random(3, 6, seed=2)

    def gradient():
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(last, torch.ones_like(last))
            loss = linear(linear(x, first).tanh(), dual).exp().sum()
            (grad,) = torch.autograd.grad(loss, first, create_graph=create_graph)
            return forward_ad.unpack_dual(grad).tangent.detach()

    assert_close(*by_both(monkeypatch, gradient))


def test_operands_may_have_overlapping_memory():
    rows = torch.arange(12.0).unfold(0, 8, 2)
    weight = random(3, 8, requires_grad=False)
    assert_close(onednn_linear(weight, rows), weight @ rows.T)
    weight.requires_grad_()
    onednn_linear(rows, weight).sum().backward()
    assert_close(weight.grad, rows.sum(0).expand(3, 8))


@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (None, 0), (0, 2)])
def test_vmap_matches_torch(in_dims):
    x = random(*((4, 5, 8), (5, 4, 8), (5, 8))[in_dims[0] if in_dims[0] is not None else 2], requires_grad=False)
    weight = random(*{None: (3, 8), 0: (4, 3, 8), 2: (3, 8, 4)}[in_dims[1]], seed=1, requires_grad=False)
    ours, theirs = (torch.vmap(function, in_dims)(x, weight) for function in (onednn_linear, F.linear))
    assert_close(ours, theirs)


def test_flop_counter_counts_forward_and_backward():
    use_fast_linear(nn.Linear(8, 3))  # as any model that has such layers
    counts = []
    for function in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            function(random(2, 5, 8), random(3, 8)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 10 * 8 * 3


class Quantised(torch.Tensor):
    """A tensor with its own linear."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "its own" if func is F.linear else super().__torch_function__(func, types, args, kwargs or {})


def test_unsupported_operands_fall_back_from_onednn(monkeypatch):
    monkeypatch.setattr(module, "MIN_MULTIPLICATIONS", 5 * 8 * 3)
    x, weight = random(5, 8), random(3, 8, seed=1)
    assert asked(lambda: linear(x, weight)) == 1
    assert asked(lambda: linear(x, weight).sum().backward()) == 3  # of both operands backward
    assert asked(lambda: linear(x[:4], weight)) == 0  # too small
    for dtype in (torch.float64, torch.bfloat16):
        assert asked(lambda dtype=dtype: linear(x.to(dtype), weight.to(dtype))) == 0
    with torch.autocast("cpu"):
        assert asked(lambda: linear(x, weight)) == 0
        assert linear(x, weight).dtype is torch.bfloat16
    assert linear(x, weight.detach().as_subclass(Quantised)) == "its own"
    assert linear(x.to("meta"), weight.to("meta")).shape == (5, 3)
    with forward_ad.dual_level():
        output = linear(forward_ad.make_dual(x, torch.ones_like(x)), weight)
        assert_close(forward_ad.unpack_dual(output).tangent, torch.ones_like(x) @ weight.T)


def test_disabling_mkldnn_in_torch_disables_onednn_products(monkeypatch):
    asked_of = []

    def product(*args):
        asked_of.append(args)
        return F.linear(*args[:2])

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", product)
    x, weight = random(5, 8), random(3, 8, seed=1)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_close(linear(x, weight), F.linear(x, weight))
    assert not asked_of
    linear(x, weight)
    assert len(asked_of) == 1


def test_built_models_use_fast_linear_and_can_be_copied_and_pickled(config_of):
    built, tokens = build_model(config_of("retention", "mamba2")), torch.arange(12).view(2, 6)
    layers = [layer for layer in built.modules() if isinstance(layer, nn.Linear)]
    assert len(layers) > 4
    assert all(type(layer) is Linear for layer in layers)
    assert str(built).count("Linear(") == len(layers)
    for copy in (deepcopy(built), pickle.loads(pickle.dumps(built))):
        assert_close(copy(tokens).logits, built(tokens).logits, rtol=0, atol=0)
        assert copy.state_dict().keys() == built.state_dict().keys()
        assert [type(m) for m in copy.modules()] == [type(m) for m in built.modules()]


def test_one_dynamic_graph_serves_every_token_count():
    layer = nn.Sequential(Linear(8, 6), nn.SiLU(), Linear(6, 4, bias=False))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for length in (3, 5, 600):
        assert_close(compiled(random(2, length, 8)), layer(random(2, length, 8)))
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("seqmix.linear" in target for target in targets) == 2
    # the decode step has its own products: models/compiling.py
    compiled(random(2, 1, 8))
    assert len(graphs) == 2
    assert not any("seqmix.linear" in str(node.target) for node in graphs[1].graph.nodes)
    torch._dynamo.reset()


@pytest.fixture
def native(monkeypatch):
    """Products of any size are for the native kernel; the calls that it gets."""
    if build.failure("linear") is not None:
        pytest.skip("there is no C++ compiler")
    calls = []
    monkeypatch.setattr(kernel, "MIN_WEIGHTS", 0)
    monkeypatch.delenv("SEQMIX_NATIVE", raising=False)
    monkeypatch.setattr(module, "multiply_rows", lambda *args: calls.append(args) or kernel.multiply_rows(*args))
    return calls


@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # `native` lists calls
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    width=st.integers(1, 40),
    outputs=st.integers(1, 140),
    layout=st.sampled_from(sorted(LAYOUTS)),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_products_of_few_rows_use_native_kernel(native, rows, width, outputs, layout, bias, dtype):
    x = LAYOUTS[layout](random(*rows, width, dtype=dtype, requires_grad=False))
    weight = random(outputs, width, seed=1, dtype=dtype, requires_grad=False)
    added = random(outputs, seed=2, dtype=dtype, requires_grad=False) if bias else None
    count = x.numel() // width
    before = len(native)
    y = linear(x, weight, added)
    assert len(native) - before == (kernel.MIN_ROWS <= count <= kernel.MAX_ROWS)
    exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
    assert (y.dtype, y.shape) == (dtype, exact.shape)
    assert (y - exact).norm() <= {torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype] * (1 + exact.norm())


def test_unsupported_products_bypass_native_kernel(native, monkeypatch):
    x, weight = random(2, 8, requires_grad=False), random(3, 8, seed=1, requires_grad=False)
    linear(x, weight)
    assert len(native) == 1
    linear(x, weight.detach().requires_grad_()).sum().backward()
    linear(x.double(), weight.double())
    linear(x, weight.T.contiguous().T)
    linear(x[:1].expand(9, -1), weight)
    assert linear(x, weight.as_subclass(Quantised)) == "its own"
    assert asked(lambda: linear(x, weight)) == 1  # by oneDNN, as a dispatch mode watches
    torch.vmap(lambda row: linear(row[None], weight))(x)
    traced = torch.jit.trace(lambda x: linear(x, weight), (x,), check_trace=False)
    assert_close(traced(x + 1), F.linear(x + 1, weight))
    with torch.autocast("cpu"):
        assert linear(x, weight).dtype is torch.bfloat16
    monkeypatch.setenv("SEQMIX_NATIVE", "0")
    linear(x, weight)
    assert len(native) == 1


@pytest.mark.slow
@pytest.mark.skipif(build.failure("linear") is not None, reason="native kernels need a compiler")
def test_compiled_call_uses_native_kernel_for_few_rows(monkeypatch):
    monkeypatch.setattr(module, "USE_ONEDNN", False)
    model = build_model(load_config("retnet-tiny", ["model.n_layers=1", "model.d_model=256"]).model).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        state = model.init_state(1)
        expected, _ = verify(model, tokens, state)
        compiled = compiled_for(model, verify, backend=rows_as_sums)
        actual, _ = compiled(model, tokens, state)
        with torch.profiler.profile() as profile:
            compiled(model, tokens, state)
    assert "seqmix::multiply_rows" in {event.key for event in profile.key_averages()}
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)
