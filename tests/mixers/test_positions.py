"""Positions, angles and rotations, dense and packed."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from seqmix.mixers.parts.rotary import frequencies, rotate, rotation
from seqmix.ops.packing import Documents, advance, document_of_token, token_positions

CPU = torch.device("cpu")
TURN = Fraction("6.28318530717958647692528676655900576839433879875021164194988918461563281257")


def exactly(actual, expected, tolerance=1e-12):
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def equal(actual, expected):
    assert_close(actual, torch.tensor(expected), rtol=0, atol=0)


@st.composite
def documents(draw):
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(sum))
    offsets = draw(st.lists(st.integers(0, 10**7), min_size=len(lengths), max_size=len(lengths)))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return lengths, offsets, torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


@settings(deadline=None)
@given(documents())
def test_packed_positions_count_from_each_documents_offset(packed):
    lengths, offsets, boundaries = packed
    length = sum(lengths)
    row = Documents.of(boundaries, length)
    assert (row.number, row.boundaries) == (len(lengths), tuple(boundaries.tolist()))
    equal(row.of_token, document_of_token(boundaries, length).tolist())
    equal(document_of_token(boundaries, length), [n for n, size in enumerate(lengths) for _ in range(size)])
    fresh = [t for size in lengths for t in range(size)]
    equal(token_positions(length, None, row, CPU), [fresh])
    continued = [offset + t for size, offset in zip(lengths, offsets, strict=True) for t in range(size)]
    equal(token_positions(length, torch.tensor(offsets), row, CPU), [continued])
    equal(advance(None, 1, length, row, CPU), lengths)
    equal(advance(torch.tensor(offsets), 1, length, row, CPU), [a + b for a, b in zip(offsets, lengths, strict=True)])


def test_rows_of_a_batch_have_their_own_offsets():
    equal(token_positions(3, None, None, CPU), [[0, 1, 2]])
    equal(token_positions(3, torch.tensor([0, 7]), None, CPU), [[0, 1, 2], [7, 8, 9]])
    equal(advance(None, 2, 3, None, CPU), [3, 3])
    equal(advance(torch.tensor([0, 7]), 2, 3, None, CPU), [3, 10])


def test_schedules_of_angles():
    rope = frequencies(8, "rope", 10000.0, CPU)
    retnet = frequencies(8, "retnet", 10000.0, CPU)
    assert rope.dtype == retnet.dtype == torch.float64
    exactly(rope, torch.tensor([1, 1e-1, 1e-2, 1e-3], dtype=torch.float64))
    # the authors' schedule reaches 1/base
    exactly(retnet, torch.tensor([1, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4], dtype=torch.float64))
    exactly(retnet, 1 / 10000 ** torch.linspace(0, 1, 4, dtype=torch.float64))
    exactly(frequencies(4, "rope", 100.0, CPU), torch.tensor([1, 0.1], dtype=torch.float64))
    for schedule in ("rope", "retnet"):
        exactly(frequencies(2, schedule, 10000.0, CPU), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("position", [0, 1, 12345, 1_000_000, 2**31 + 5])
def test_angles_are_exact_far_out(position):
    theta = frequencies(4, "rope", 10000.0, CPU)
    by = rotation(torch.tensor([[position]]), theta, torch.float64)
    # the angle is a rational number, and float64 rounds it once
    angles = [float(Fraction(position) * Fraction(x) % TURN) for x in theta.tolist()]
    tolerance = 1e-15 + position * 2**-52
    cos, sin = ([function(angle) for angle in angles] for function in (math.cos, math.sin))
    assert_close(by.cos.flatten(), torch.tensor(cos, dtype=torch.float64), rtol=0, atol=tolerance)
    assert_close(by.sin.flatten(), torch.tensor(sin, dtype=torch.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_are_cast_after_they_are_formed(dtype):
    positions, theta = torch.tensor([[1_000_000, 999_983]]), frequencies(64, "rope", 10000.0, CPU)
    by, exact = rotation(positions, theta, dtype), rotation(positions, theta, torch.float64)
    assert by.cos.dtype == by.sin.dtype == dtype
    assert_close(by, type(by)(*(x.to(dtype) for x in exact)), rtol=0, atol=0)


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


def test_rotation_takes_the_gradient_of_a_sum():  # whose strides are 0
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    positions, theta = torch.arange(3)[None], frequencies(4, "rope", 10000.0, CPU)
    rotate(x, rotation(positions, theta, x.dtype)).sum().backward()
    exactly(x.grad, turned(torch.ones_like(x), -positions, theta))


def test_products_depend_on_distances_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 8, 1, 6, dtype=torch.float64, generator=generator)
    theta = frequencies(6, "rope", 10000.0, CPU)

    def products(start):
        by = rotation(torch.arange(start, start + 8)[None], theta, torch.float64)
        return torch.einsum("bihk,bjhk->ij", rotate(q, by), rotate(k, by))

    exactly(products(1_000_000), products(0), 1e-8)
