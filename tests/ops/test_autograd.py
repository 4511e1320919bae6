"""How an op enters torch, seen at toys: schemas, fakes, gradients that are wanted, and what is refused."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from seqmix.ops.autograd import Op
from seqmix.registry import SeqmixError

exactly = torch.testing.assert_close
SEEN = []
"""Whether autocast is on in the bodies, and what each backward pass is asked for."""


class Toy(NamedTuple):
    """y = scale * times * x * weight + bias of the tokens that `cuts` leave, and their sums."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    cuts: Sequence[int] | None
    scale: float
    times: int
    negative: bool
    needs_grad: bool = False

    @property
    def factor(self):
        return self.scale * self.times * (-1 if self.negative else 1)

    @property
    def mask(self):
        mask = torch.ones(self.x.shape[-1], dtype=self.x.dtype)
        mask[list(self.cuts or ())] = 0
        return mask


def fake(call):
    kept = call.x.new_empty(call.x.shape if call.needs_grad else 0)
    return call.x.new_empty(call.x.shape), call.x.new_empty(call.x.shape[:-1]), kept


def forward(call):
    SEEN.append(torch.is_autocast_enabled("cpu"))
    kept = call.factor * call.mask * call.x
    y = kept if call.weight is None else kept * call.weight
    y = y.clone() if call.bias is None else y + call.bias
    return y, y.sum(-1), kept.contiguous() if call.needs_grad else kept.new_empty(0)


def backward(call, gradients):
    SEEN.append((torch.is_autocast_enabled("cpu"), gradients.wanted, [d is not None for d in gradients.outputs]))
    (d_y, d_sum), (kept,) = gradients.outputs, gradients.saved
    above = torch.zeros_like(call.x) if d_y is None else d_y
    above = above if d_sum is None else above + d_sum[..., None]
    weight = 1 if call.weight is None else call.weight
    # more than is wanted, and the bias too late: what is missing is zero
    found = {"x": (call.factor * call.mask * above * weight).mT.contiguous().mT, "weight": (kept * above).sum((0, 1))}
    return found | ({} if call.negative else {"bias": above.sum((0, 1)).double()})


OP = Op("test_toy", Toy, fake=fake, forward=forward, backward=backward, saves=1)


@pytest.fixture(autouse=True)
def _nothing_is_seen():
    torch.manual_seed(0)
    SEEN.clear()


def toy(*, weight=True, bias=True, cuts=None, negative=False, dtype=torch.float64, grad=("x", "weight", "bias")):
    given = {"x": torch.randn(2, 3, 4, dtype=dtype), "weight": torch.randn(4, dtype=dtype) if weight else None}
    given["bias"] = torch.randn(4, dtype=dtype) if bias else None
    given = {name: x if x is None else x.requires_grad_(name in grad) for name, x in given.items()}
    return Toy(**given, cuts=cuts, scale=0.5, times=3, negative=negative)


def plain(call):
    """The same in torch's own operations."""
    y = call.factor * call.mask * call.x * (1 if call.weight is None else call.weight)
    y = y if call.bias is None else y + call.bias
    return y, y.sum(-1)


def gradients(outputs, call):
    leaves = [x for x in call[:3] if x is not None and x.requires_grad]
    loss = sum((y * torch.arange(y.numel()).view(y.shape).cos()).sum() for y in outputs)
    return torch.autograd.grad(loss, leaves)


CALLS = list(product((True, False), (True, False), (None, [], [1, 2])))


@pytest.mark.parametrize(("weight", "bias", "cuts"), CALLS)
def test_outputs_and_gradients_are_those_of_torchs_operations(weight, bias, cuts):
    call = toy(weight=weight, bias=bias, cuts=cuts)
    y, total, kept = OP(call)
    assert kept.shape == call.x.shape
    exactly((y, total), plain(call))
    exactly(gradients((y, total), call), gradients(plain(call), call))


@pytest.mark.parametrize(
    ("call", "grad"),
    [
        ((True, True, [1, 2]), ("x", "weight", "bias")),
        ((True, False, []), ("x",)),
        ((False, True, None), ("bias",)),
        ((True, True, None), ()),
        ((False, False, [1]), ()),
    ],
    ids=str,
)
def test_it_passes_opcheck(call, grad):
    weight, bias, cuts = call
    call = toy(weight=weight, bias=bias, cuts=cuts, grad=grad)
    results = torch.library.opcheck(torch.ops.seqmix.test_toy.default, OP.checked(call))
    assert set(results.values()) == {"SUCCESS"}
    kept, wanted = OP(toy()._replace(x=call.x))[2], [True, weight, False]
    arguments = (None, torch.randn(2, 3).double(), *OP.checked(toy()), kept.detach(), wanted)
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    results = torch.library.opcheck(
        torch.ops.seqmix.test_toy_backward.default, tuple(arguments), test_utils=("test_schema", "test_faketensor")
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("weight", "bias"), [(True, True), (False, False)])
def test_it_is_one_node_of_one_graph_for_all_sizes(weight, bias):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda call: OP(call)[:2], fullgraph=True, dynamic=True, backend=counter)
    graphs = 0
    for rows in (5, 7, 9):  # no other size: a compiler takes equal ones for one
        call = toy(weight=weight, bias=bias, cuts=[1])
        call = call._replace(x=torch.randn(2, rows, 4, dtype=torch.float64, requires_grad=True))
        outputs = compiled(call)
        exactly(outputs, plain(call))
        exactly(gradients(outputs, call), gradients(plain(call), call))
        graphs = graphs or counter.frame_count  # a number that is no integer makes a compiler begin twice
    assert counter.frame_count == graphs
    targets = [node.target for node in counter.graphs[-1].graph.nodes if "test_toy" in str(node.target)]
    assert targets == [torch.ops.seqmix.test_toy.default]


def test_it_is_told_whether_a_backward_pass_may_follow():
    assert [OP(toy(grad=grad))[2].numel() for grad in ((), ("x",), ("bias",))] == [0, 24, 24]
    with torch.no_grad():
        assert OP(toy())[2].numel() == 0
    # whatever the caller says
    assert OP(toy(grad=())._replace(needs_grad=True))[2].numel() == 0


@pytest.mark.parametrize("grad", [("x",), ("weight",), ("bias", "x")], ids=str)
def test_a_gradient_that_is_not_wanted_is_not_returned(grad):
    call = toy(grad=grad)
    y, _, _ = OP(call)
    y.sum().backward()
    assert SEEN[-1][1:] == (frozenset(grad), [True, False])
    for name, leaf in call._asdict().items():
        if isinstance(leaf, Tensor):
            assert (leaf.grad is not None) == (name in grad)
    # and the backward op has nothing in its place
    kept = torch.zeros_like(call.x).detach()
    found = torch.ops.seqmix.test_toy_backward(torch.ones_like(kept), None, *call, kept, [True, False, False])
    assert [x.numel() for x in found] == [24, 0, 0]


def test_a_gradient_that_is_missing_is_zero():
    call = toy(negative=True)
    *_, of_bias = gradients(OP(call)[:2], call)
    exactly(of_bias, torch.zeros(4, dtype=torch.float64))


def test_a_gradient_lies_and_is_as_the_input():
    call = toy(dtype=torch.float32)
    for gradient, leaf in zip(gradients(OP(call)[:2], call), call[:3], strict=True):
        assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)
        assert gradient.is_contiguous()


def test_an_output_on_which_nothing_depends_has_no_gradient():
    call = toy()
    _, total, _ = OP(call)
    total.sum().backward()
    assert SEEN[-1][2] == [False, True]
    # what is saved is no output, and its gradient is nobody's
    _, _, kept = OP(toy())
    before = len(SEEN)
    kept.sum().backward()
    assert len(SEEN) == before


def test_activations_can_be_recomputed():
    call = toy()
    expected = gradients(OP(call)[:2], call)
    recomputed = checkpoint(
        lambda *leaves: OP(call._replace(**dict(zip(Toy._fields, leaves, strict=False))))[:2],
        *call[:3],
        use_reentrant=False,
    )
    exactly(gradients(recomputed, call), expected)


def test_second_derivatives_are_refused_by_a_sentence():
    call = toy()
    (gradient,) = torch.autograd.grad(OP(call)[0].square().sum(), call.x, create_graph=True)
    with pytest.raises(SeqmixError, match=r"^test_toy has no second derivatives: its gradients cannot be") as error:
        gradient.sum().backward()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_forward_mode_is_refused_by_a_sentence(name):
    call = toy(grad=())
    with pytest.raises(SeqmixError, match=r"^test_toy has no forward-mode differentiation, only backward$"):
        torch.func.jvp(lambda x: OP(call._replace(**{name: x}))[0], (getattr(call, name),), (getattr(call, name),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(getattr(call, name), torch.ones_like(getattr(call, name)))
        with pytest.raises(SeqmixError, match="test_toy has no forward-mode"):
            OP(call._replace(**{name: dual}))


def test_autocast_is_off_inside_forward_and_backward():
    call = toy(dtype=torch.float32)
    expected = gradients(OP(call)[:2], call)
    SEEN.clear()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = OP(call)[:2]
        found = gradients(outputs, call)
    assert [seen if isinstance(seen, bool) else seen[0] for seen in SEEN] == [False, False]
    assert_close((outputs, found), (plain(call), expected), rtol=1e-6, atol=1e-6)
    assert {x.dtype for x in (*outputs, *found)} == {torch.float32}


# ---- one input, one output


class Single(NamedTuple):
    x: Tensor


TWICE = Op(
    "test_twice",
    Single,
    fake=lambda call: (torch.empty_like(call.x),),
    forward=lambda call: (2 * call.x,),
    backward=lambda call, gradients: {"x": 2 * gradients.outputs[0]},
    outputs=1,
)


def test_one_input_and_one_output_are_no_tuples_to_torch():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (y,) = TWICE(Single(x))
    exactly(torch.autograd.grad(y.sum(), x), (torch.full_like(x, 2),))
    assert set(torch.library.opcheck(torch.ops.seqmix.test_twice.default, (x,)).values()) == {"SUCCESS"}
    assert torch.autograd.gradcheck(lambda x: TWICE(Single(x)), x)


# ---- an input that is written


class Step(NamedTuple):
    x: Tensor
    state: Tensor


def add_to_state(call):
    call.state.add_(call.x)
    return (2 * call.state,)


ADD = Op(
    "test_add",
    Step,
    fake=lambda call: (torch.empty_like(call.x),),
    forward=add_to_state,
    backward=None,
    outputs=1,
    mutates=("state",),
)


def test_an_input_may_be_written_in_place():
    x, state = torch.randn(3), torch.ones(3)
    where, version = state.data_ptr(), state._version
    (y,) = ADD(Step(x, state))
    exactly((y, state), (2 * (1 + x), 1 + x))
    assert (state.data_ptr(), state._version > version) == (where, True)
    results = torch.library.opcheck(torch.ops.seqmix.test_add.default, (x, state))
    assert set(results.values()) == {"SUCCESS"}


def test_a_compiler_sees_that_it_is_written():
    def steps(x, state):
        return [ADD(Step(x, state))[0] for _ in range(2)], 3 * state

    x, states = torch.randn(3), [torch.ones(3), torch.ones(3)]
    found, expected = (
        function(x, state)
        for function, state in zip(
            (torch.compile(steps, fullgraph=True, backend="aot_eager"), steps), states, strict=True
        )
    )
    exactly(found, expected)
    exactly(*states)
