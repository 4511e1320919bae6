"""Retention: the paper's decays and row normaliser, and what cancels under the head norm."""

import math

import pytest
import torch
from formulas import build, exactly, projections, tokens
from torch import nn
from torch.testing import assert_close

from seqmix.mixers import Paradigm
from seqmix.mixers.parts import GatedNorm
from seqmix.mixers.retention import RetentionConfig, row_scale

PARADIGMS = list(Paradigm)
CPU = torch.device("cpu")


def test_the_state_is_the_decayed_sum():
    mixer = build("retention", rotation="none", decay="constant", gamma=0.9)
    x = tokens(7)
    k, v = ((x @ projections(mixer)[name].T).unflatten(-1, (3, -1)) for name in "kv")
    decays = 0.9 ** torch.arange(6, -1, -1).double()
    for paradigm in PARADIGMS:
        _, state = mixer(x, paradigm=paradigm, return_state=True)
        exactly(state.memory, torch.einsum("t,bthk,bthv->bhkv", decays, k, v))
        assert_close(state.position, torch.tensor([7, 7]), rtol=0, atol=0)


def test_the_papers_decays():
    # §3.1: what the paper's runs had with 8 heads
    decays = build("retention", d_model=16, n_heads=8, decay="log_uniform").decay(CPU).exp()
    paper = [0.96875, 0.97897, 0.98585, 0.99048, 0.99359, 0.99569, 0.99710, 0.99805]
    assert_close(decays, torch.tensor(paper, dtype=torch.float64), rtol=0, atol=5e-6)
    # Eq. 8
    decays = build("retention", d_model=16, n_heads=8).decay(CPU).exp()
    exactly(decays, torch.tensor([1 - 2.0**-n for n in range(5, 13)], dtype=torch.float64), 1e-15)
    assert_close(decays[[0, 7]], torch.tensor([0.96875, 0.999756], dtype=torch.float64), rtol=0, atol=5e-7)


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_log_uniform_decays_span_the_same_range_for_any_number_of_heads(heads):
    leaks = 1 - build("retention", d_model=20, n_heads=heads, decay="log_uniform").decay(CPU).exp()
    exactly(leaks[0].item(), 1 / 32)
    if heads > 1:
        exactly(leaks[-1].item(), 1 / 512)
        ratios = leaks[1:] / leaks[:-1]
        exactly(ratios, ratios[:1].expand_as(ratios))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_slowest_decay_is_not_rounded_to_one(dtype):
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
def test_a_learnable_decay_starts_at_its_schedule_and_learns(fields, dtype):
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
def test_the_row_normaliser_is_one_over_the_root_of_the_sum(positions):
    log_decay = torch.log1p(-(2.0 ** -torch.tensor([1.0, 5.0, 12.0, 25.0, 40.0], dtype=torch.float64)))
    sums = [[sum(math.exp(a * i) for i in range(n + 1)) for a in log_decay.tolist()] for n in positions]
    expected = torch.tensor(sums, dtype=torch.float64).rsqrt()
    exactly(row_scale(torch.tensor([positions]), log_decay)[0, :, :, 0], expected, 1e-12)
    expected = (torch.tensor(positions).double() + 1).rsqrt()
    exactly(row_scale(torch.tensor([positions]), None).flatten(), expected, 1e-15)


def test_the_row_normaliser_far_out_is_its_limit():
    log_decay = torch.log1p(-(2.0 ** -torch.tensor([5.0, 12.0], dtype=torch.float64)))
    scale = row_scale(torch.tensor([[10**9]]), log_decay).flatten()
    exactly(scale, (2.0 ** -torch.tensor([5.0, 12.0], dtype=torch.float64)).sqrt(), 1e-12)


def test_gradients_of_the_row_normaliser_are_numerical_ones():
    log_decay = torch.tensor([-0.7, -1e-3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: row_scale(torch.tensor([[0, 1, 50]]), a), [log_decay], eps=1e-7)


@pytest.mark.parametrize("fields", [{"decay": "geometric"}, {"decay": "none"}], ids=str)
def test_without_eps_the_head_norm_cancels_the_row_normaliser(fields):
    x = tokens(9)
    with_it, without = (build("retention", row_norm=on, norm_eps=0.0, **fields)(x)[0] for on in (True, False))
    exactly(with_it, without)
    far, near = (build("retention", row_norm=on, norm_eps=1e-4, **fields)(x)[0] for on in (True, False))
    assert (far - near).abs().max() > 1e-6


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.3])
def test_statistics_of_the_head_norm_are_a_tokens_and_a_heads_own(eps):
    x = tokens(5, batch_size=3).unflatten(-1, (3, 4))
    # nn.GroupNorm pools over all positions after the channels, so every token becomes a row
    group = nn.GroupNorm(3, 12, eps=eps, affine=False, dtype=torch.float64)(x.flatten(0, 1).flatten(1)).view_as(x)
    by_norm = {norm: GatedNorm(4, norm, "none", affine=False, eps=eps) for norm in ("group", "rms", "none")}
    exactly(by_norm["group"](x, None), group, 1e-12)
    exactly(by_norm["rms"](x, None), x / (x.square().mean(-1, keepdim=True) + eps).sqrt(), 1e-12)
    assert by_norm["none"](x, None) is x


def test_a_learnable_decay_compiles_into_one_graph():
    torch._dynamo.reset()
    mixer, results = build("retention", learnable_decay=True), []
    for function in (mixer, torch.compile(mixer, fullgraph=True, backend="aot_eager")):
        y, state = function(tokens(9), mixer.init_state(2), return_state=True)
        loss = y.square().sum() + state.memory.sum()
        results.append((y, state.memory, *torch.autograd.grad(loss, list(mixer.parameters()))))
    exactly(*results)


def test_it_can_be_built_without_memory():
    with torch.device("meta"):
        mixer = RetentionConfig(n_heads=3, learnable_decay=True).build(12, layer_idx=0, n_layers=1)
    assert all(p.is_meta for p in mixer.parameters())
    mixer.to_empty(device="cpu").reset_parameters()
    exactly(mixer.decay(CPU), build("retention").decay(CPU), 1e-6)
    assert build("retention", decay="none").decay(CPU) is None
