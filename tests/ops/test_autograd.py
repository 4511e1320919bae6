"""Registration of ops with torch, tested on toy ops: schemas, fake kernels, needed gradients and errors."""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import seqmix.ops.runtime.custom_op as module
from seqmix.ops.runtime.custom_op import Op, current
from seqmix.registry import SeqmixError

exactly = torch.testing.assert_close
SEEN = []
"""What each backward pass is asked for."""


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
    scaled = call.x.new_empty(call.x.shape if call.needs_grad else 0)
    return call.x.new_empty(call.x.shape), call.x.new_empty(call.x.shape[:-1]), scaled


def forward(call):
    scaled = call.factor * call.mask * call.x
    y = scaled if call.weight is None else scaled * call.weight
    y = y.clone() if call.bias is None else y + call.bias
    return y, y.sum(-1), scaled.contiguous() if call.needs_grad else scaled.new_empty(0)


def backward(call, gradients):
    SEEN.append((gradients.wanted, [d is not None for d in gradients.outputs]))
    (d_y, d_sum), (scaled,) = gradients.outputs, gradients.saved
    above = torch.zeros_like(call.x) if d_y is None else d_y
    above = above if d_sum is None else above + d_sum[..., None]
    weight = 1 if call.weight is None else call.weight
    # more than is wanted, and the bias too late: what is missing is zero
    found = {"x": (call.factor * call.mask * above * weight).mT.contiguous().mT, "weight": (scaled * above).sum((0, 1))}
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


def passes(op, arguments, **options):
    assert set(torch.library.opcheck(op.default, arguments, **options).values()) == {"SUCCESS"}


CALLS = list(product((True, False), (True, False), (None, [], [1, 2])))


@pytest.mark.parametrize(("weight", "bias", "cuts"), CALLS)
def test_outputs_and_gradients_match_plain_torch(weight, bias, cuts):
    call = toy(weight=weight, bias=bias, cuts=cuts)
    y, total, saved = OP(call)
    assert saved.shape == call.x.shape
    exactly((y, total), plain(call))
    exactly(gradients((y, total), call), gradients(plain(call), call))


def test_tensors_are_saved_only_if_backward_may_follow():
    assert [OP(toy(grad=grad))[2].numel() for grad in ((), ("x",), ("bias",))] == [0, 24, 24]
    with torch.no_grad():
        assert OP(toy())[2].numel() == 0
    # whatever the caller says
    assert OP(toy(grad=())._replace(needs_grad=True))[2].numel() == 0


@pytest.mark.parametrize("grad", [("x",), ("weight",), ("bias", "x")], ids=str)
def test_unneeded_gradients_are_not_returned(grad):
    call = toy(grad=grad)
    y, _, _ = OP(call)
    y.sum().backward()
    assert SEEN[-1] == (frozenset(grad), [True, False])
    for name, leaf in call._asdict().items():
        if isinstance(leaf, Tensor):
            assert (leaf.grad is not None) == (name in grad)
    # and the backward op has nothing in its place
    scaled = torch.zeros_like(call.x).detach()
    found = torch.ops.seqmix.test_toy_backward(torch.ones_like(scaled), None, *call, scaled, [True, False, False])
    assert [x.numel() for x in found] == [24, 0, 0]


def test_missing_gradients_are_zero_and_all_are_contiguous():
    call = toy(negative=True, dtype=torch.float32)
    found = gradients(OP(call)[:2], call)
    for gradient, leaf in zip(found, call[:3], strict=True):
        assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)
        assert gradient.is_contiguous()
    exactly(found[2], torch.zeros(4))


def test_unused_output_receives_no_gradient():
    call = toy()
    _, total, _ = OP(call)
    total.sum().backward()
    assert SEEN[-1][1] == [False, True]
    # what is saved is not an output: its gradient is ignored
    _, _, scaled = OP(toy())
    before = len(SEEN)
    scaled.sum().backward()
    assert len(SEEN) == before


def test_second_derivatives_raise():
    call = toy()
    (gradient,) = torch.autograd.grad(OP(call)[0].square().sum(), call.x, create_graph=True)
    with pytest.raises(SeqmixError, match=r"test_toy.*second") as error:
        gradient.sum().backward()
    assert "\n" not in str(error.value)


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


def test_op_with_one_input_and_one_output_passes_opcheck_and_gradcheck():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (y,) = TWICE(Single(x))
    exactly(torch.autograd.grad(y.sum(), x), (torch.full_like(x, 2),))
    passes(torch.ops.seqmix.test_twice, (x,))
    assert torch.autograd.gradcheck(lambda x: TWICE(Single(x)), x)


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


def test_op_may_update_an_input_in_place():
    x, state = torch.randn(3), torch.ones(3)
    where, version = state.data_ptr(), state._version
    (y,) = ADD(Step(x, state))
    exactly((y, state), (2 * (1 + x), 1 + x))
    assert (state.data_ptr(), state._version > version) == (where, True)
    passes(torch.ops.seqmix.test_add, (x, state))


def test_compiled_op_updates_its_input_in_place():
    def steps(x, state):
        return [ADD(Step(x, state))[0] for _ in range(2)], 3 * state

    x, states = torch.randn(3), [torch.ones(3), torch.ones(3)]
    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager")
    exactly(compiled(x, states[0]), steps(x, states[1]))
    exactly(*states)


def test_op_makes_the_device_of_its_tensors_current_while_it_runs(monkeypatch):
    entered = []

    class Guard(nullcontext):
        def __init__(self, device):
            super().__init__()
            entered.append(device)

    monkeypatch.setattr(torch.cuda, "device", Guard)
    other = torch.device("cuda:1")
    with current(torch.device("cpu")), current(other):
        assert entered == [other]
    entered.clear()
    monkeypatch.setattr(module, "current", Guard)
    call = toy()
    outputs = OP(call)
    assert entered == [call.x.device]
    gradients(outputs[:2], call)
    assert entered == [call.x.device] * 2
