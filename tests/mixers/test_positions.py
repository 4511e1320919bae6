"""Angles and rotations of positions."""

import math
from fractions import Fraction

import pytest
import torch
from torch.testing import assert_close

from seqmix.mixers.parts.rotary import frequencies, rotate, rotation

CPU = torch.device("cpu")
TURN = Fraction("6.28318530717958647692528676655900576839433879875021164194988918461563281257")


def exactly(actual, expected, tolerance=1e-12):
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("position", [0, 1, 12345, 1_000_000, 2**31 + 5])
def test_angles_are_exact_at_large_positions(position):
    theta = frequencies(4, "rope", 10000.0, CPU)
    by = rotation(torch.tensor([[position]]), theta, torch.float64)
    # the angle is a rational number, and float64 rounds it once
    angles = [float(Fraction(position) * Fraction(x) % TURN) for x in theta.tolist()]
    tolerance = 1e-15 + position * 2**-52
    cos, sin = ([function(angle) for angle in angles] for function in (math.cos, math.sin))
    assert_close(by.cos.flatten(), torch.tensor(cos, dtype=torch.float64), rtol=0, atol=tolerance)
    assert_close(by.sin.flatten(), torch.tensor(sin, dtype=torch.float64), rtol=0, atol=tolerance)


def turned(x, positions, theta):
    """Rotation by 2 x 2 matrices."""
    angle = positions[..., None].double() * theta
    matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
    return torch.einsum("btpij,bthpj->bthpi", matrix, x.unflatten(-1, (-1, 2))).flatten(-2)


def layouts(x):
    """The same tensor [B T H K] in every layout that a projection may leave it in."""
    fused = torch.cat((x, torch.ones_like(x)), dim=-1)
    return {
        "contiguous": x,
        "slice": fused[..., : x.shape[-1]],
        "second slice": torch.cat((torch.ones_like(x), x), dim=-1)[..., x.shape[-1] :],
        "odd strides": torch.cat((x, torch.ones_like(x[..., :1])), dim=-1)[..., :-1],
        "odd offset": torch.cat((torch.ones_like(x[..., :1]), x, torch.ones_like(x[..., :1])), dim=-1)[..., 1:-1],
        "every other": torch.stack((x, torch.ones_like(x)), dim=-1).flatten(-2)[..., ::2],
        "heads first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "keys first": x.mT.contiguous().mT,
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 2)))
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotation_turns_interleaved_pairs(layout, compiled, dtype):
    torch._dynamo.reset()
    function = torch.compile(rotate, fullgraph=True, backend="aot_eager") if compiled else rotate
    generator = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(2, 2, 3, 4, 6, dtype=torch.float64, generator=generator).to(dtype)
    positions, theta = torch.tensor([[0, 1, 2], [5, 6, 7]]), frequencies(6, "retnet", 10000.0, CPU)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
    leaf = layouts(x)[layout].detach().requires_grad_()
    y = function(leaf, rotation(positions, theta, dtype))
    y.backward(upstream)
    assert y.dtype == leaf.grad.dtype == dtype
    exactly(y.double(), turned(x.double(), positions, theta), tolerance)
    # the gradient turns back
    exactly(leaf.grad.double(), turned(upstream.double(), -positions, theta), tolerance)


def test_rotation_accepts_zero_stride_gradient_of_a_sum():  # whose strides are 0
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    positions, theta = torch.arange(3)[None], frequencies(4, "rope", 10000.0, CPU)
    rotate(x, rotation(positions, theta, x.dtype)).sum().backward()
    exactly(x.grad, turned(torch.ones_like(x), -positions, theta))
