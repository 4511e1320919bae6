"""Retention: the paper's decays and row normaliser."""

import math

import pytest
import torch
from mixer_formulas import build, exactly, tokens
from torch.testing import assert_close

from seqmix.mixers.retention import row_scale

CPU = torch.device("cpu")


def test_decays_match_the_paper():
    # §3.1: what the paper's runs had with 8 heads
    decays = build("retention", d_model=16, n_heads=8, decay="log_uniform").decay(CPU).exp()
    paper = [0.96875, 0.97897, 0.98585, 0.99048, 0.99359, 0.99569, 0.99710, 0.99805]
    assert_close(decays, torch.tensor(paper, dtype=torch.float64), rtol=0, atol=5e-6)
    # Eq. 8
    decays = build("retention", d_model=16, n_heads=8).decay(CPU).exp()
    exactly(decays, torch.tensor([1 - 2.0**-n for n in range(5, 13)], dtype=torch.float64), 1e-15)
    assert_close(decays[[0, 7]], torch.tensor([0.96875, 0.999756], dtype=torch.float64), rtol=0, atol=5e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slowest_decay_is_not_rounded_to_one(dtype):
    mixer = build("retention", dtype, d_model=42, n_heads=21)
    assert mixer.decay(CPU).dtype == torch.float64
    assert_close(mixer.decay(CPU)[-1].item(), -(2.0**-25) - 2.0**-51, rtol=1e-12, atol=0)
    # and a chunk of 2^10 tokens leaves exp(-2^-15) of a state
    mixer = build("retention", dtype, d_model=42, n_heads=21, chunk_size=2**10)
    state = mixer.init_state(1)
    x = torch.zeros(1, 2**10, 42, dtype=dtype)
    _, after = mixer(x, state._replace(memory=state.memory + 1), return_state=True)
    left = after.memory[0, -1].double()
    assert_close(left, torch.full_like(left, math.exp(-(2.0**-15))), rtol=1e-7, atol=0)


@pytest.mark.parametrize("fields", [{}, {"decay": "log_uniform"}, {"decay": "constant", "gamma": 0.9}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learnable_decay_starts_at_its_schedule_and_gets_gradients(fields, dtype):
    mixer = build("retention", torch.float32, n_heads=6, learnable_decay=True, **fields).to(dtype)
    mixer.reset_parameters()
    fixed = build("retention", torch.float64, n_heads=6, **fields).decay(CPU)
    assert_close(mixer.decay(CPU), fixed, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
    assert_close(mixer.decay.logit.sigmoid().log().double(), fixed, rtol=1e-2, atol=0)
    y, state = mixer(tokens(9, dtype=dtype), return_state=True)
    (y.square().sum() + state.memory.square().sum()).backward()
    assert mixer.decay.logit.grad.isfinite().all()
    assert (mixer.decay.logit.grad != 0).all()
    with torch.no_grad():
        mixer.decay.logit -= 5
    assert (mixer.decay(CPU) < fixed).all()
    assert (mixer.decay(CPU) < 0).all()


@pytest.mark.parametrize("positions", [[0, 1, 2, 3, 4, 5], [0, 7, 100, 1000]])
def test_row_normaliser_is_inverse_square_root_of_the_decay_sum(positions):
    log_decay = torch.log1p(-(2.0 ** -torch.tensor([1.0, 5.0, 12.0, 25.0, 40.0], dtype=torch.float64)))
    sums = [[sum(math.exp(a * i) for i in range(n + 1)) for a in log_decay.tolist()] for n in positions]
    expected = torch.tensor(sums, dtype=torch.float64).rsqrt()
    exactly(row_scale(torch.tensor([positions]), log_decay)[0, :, :, 0], expected, 1e-12)
    expected = (torch.tensor(positions).double() + 1).rsqrt()
    exactly(row_scale(torch.tensor([positions]), None).flatten(), expected, 1e-15)


def test_row_normaliser_reaches_its_limit_at_large_positions():
    log_decay = torch.log1p(-(2.0 ** -torch.tensor([5.0, 12.0], dtype=torch.float64)))
    scale = row_scale(torch.tensor([[10**9]]), log_decay).flatten()
    exactly(scale, (2.0 ** -torch.tensor([5.0, 12.0], dtype=torch.float64)).sqrt(), 1e-12)
