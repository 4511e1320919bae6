"""The module of the short convolution: what it adds to the op."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from seqmix.mixers.parts import ShortConvolution
from seqmix.ops.call import Call
from seqmix.ops.convolution import short_convolution


def call(x, state=None, boundaries=None, wanted=False):
    return Call.of("parallel", x.shape[1], state, wanted, boundaries)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "none"])
def test_it_is_the_op_and_the_activation(bias, activation):
    torch.manual_seed(0)
    module = ShortConvolution(6, 4, bias=bias, activation=activation)
    x, state = torch.randn(1, 7, 6), torch.randn(2, 3, 6)
    boundaries = torch.tensor([0, 2, 7])
    y, after = module(x, call(x, state, boundaries, wanted=True))
    expected, last = short_convolution(
        x, module.weight, module.bias, initial_state=state, output_final_state=True, cu_seqlens=boundaries
    )
    assert_close(y, F.silu(expected) if activation == "silu" else expected)
    assert_close(after, last)
    assert module(x, call(x))[1] is None
    conv1d = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), module.weight[:, None], module.bias, groups=6).transpose(1, 2)
    assert_close(module(x, call(x))[0], F.silu(conv1d) if activation == "silu" else conv1d)


def test_parameters_start_as_those_of_a_convolution():
    module = ShortConvolution(1000, 4, bias=True)
    assert module.weight.shape == (1000, 4)
    for parameter in module.parameters():
        assert 0.49 < parameter.abs().max() <= 0.5
    assert [name for name, _ in ShortConvolution(3, 4).named_parameters()] == ["weight"]


def test_the_state_has_the_parameters_dtype_under_autocast():
    module = ShortConvolution(6, 4)
    state = module.init_state(2)
    assert state.shape == (2, 3, 6)
    assert not state.any()
    x = torch.randn(2, 5, 6, dtype=torch.bfloat16)
    y, after = module(x, call(x, state, wanted=True))
    assert (y.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    assert module.to(torch.bfloat16).init_state(2).dtype == torch.bfloat16
