"""The Mamba-2 layer against its recurrence written out, and its options."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from seqmix.mixers import ContractError, Paradigm
from seqmix.mixers.mamba2 import Mamba2Config
from seqmix.ops.decay import decay_flops

PARADIGMS = list(Paradigm)
every_paradigm = pytest.mark.parametrize("paradigm", PARADIGMS)
D_MODEL = 12


def build(dtype=torch.float64, d_model=D_MODEL, n_layers=1, **fields):
    torch.manual_seed(0)
    config = Mamba2Config(**{"head_dim": 6, "d_state": 5, "chunk_size": 4} | fields)
    mixer = config.build(d_model, layer_idx=0, n_layers=n_layers).to(dtype)
    with torch.no_grad():
        for parameter in (mixer.D, mixer.norm_weight, mixer.decay.dt_bias):  # ones and small steps would hide errors
            parameter.add_(torch.randn_like(parameter))
    return mixer


def tokens(length, batch_size=2, dtype=torch.float64, d_model=D_MODEL):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, length, d_model, dtype=torch.float64, generator=generator).to(dtype)


def exactly(actual, expected):
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def written_out(mixer, x):
    """Output and state after each token, from nothing, token by token and head by head."""
    config, (batch, length, _) = mixer.config, x.shape
    values, keys = mixer.n_heads * config.head_dim, config.n_groups * config.d_state
    z, u, b, c, dt = (x @ mixer.in_proj.weight.T).split([values, values, keys, keys, mixer.n_heads], -1)
    ubc = torch.cat((u, b, c), -1)
    convolved = mixer.convolution.bias.expand_as(ubc).clone()
    for back in range(config.short_conv):  # the weight of the newest token is the last
        convolved[:, back:] += ubc[:, : max(length - back, 0)] * mixer.convolution.weight[:, -1 - back]
    u, b, c = (convolved * convolved.sigmoid()).split([values, keys, keys], -1)
    dt = (1 + (dt + mixer.decay.dt_bias).exp()).log()
    if config.time_step_limit is not None:
        dt = dt.clamp(*config.time_step_limit)
    heads, states = [], []
    for h in range(mixer.n_heads):
        group = h // (mixer.n_heads // config.n_groups)
        v = u[..., h * config.head_dim : (h + 1) * config.head_dim]
        key, query = (part[..., group * config.d_state : (group + 1) * config.d_state] for part in (b, c))
        state, outputs = x.new_zeros(batch, config.d_state, config.head_dim), []
        for t in range(length):
            step = dt[:, t, h, None, None]
            state = (-step * mixer.decay.A_log[h].exp()).exp() * state + key[:, t, :, None] * step * v[:, t, None]
            outputs.append((query[:, t, :, None] * state).sum(1) + mixer.D[h] * v[:, t])
        heads.append(torch.stack(outputs, 1))
        states.append(state)
    gated = (torch.cat(heads, -1) * z * z.sigmoid()).unflatten(-1, (config.n_groups, -1))
    normed = (gated / (gated.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()).flatten(2)
    y = (normed * mixer.norm_weight) @ mixer.out_proj.weight.T
    return y, torch.stack(states, 1), ubc


OPTIONS = {
    "defaults": {},
    "groups": {"n_groups": 2, "norm_eps": 0.1},
    "one head": {"head_dim": 24, "short_conv": 2},
    "limits": {"time_step_limit": (0.3, 0.9)},
    "widths": {"expand": 0.5, "d_state": 7, "short_conv": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_output_state_and_gradients_are_the_formulas(name):
    mixer = build(**OPTIONS[name])
    x = tokens(11).requires_grad_()
    leaves = [x, *mixer.parameters()]
    expected, memory, convolved = written_out(mixer, x)
    dy, ds = torch.randn_like(expected), torch.randn_like(memory)
    gradients = torch.autograd.grad((expected, memory), leaves, (dy, ds))
    for paradigm in PARADIGMS:
        y, state = mixer(x, paradigm=paradigm, return_state=True)
        exactly(y, expected)
        exactly(state.memory, memory)
        exactly(state.recent, convolved[:, -mixer.config.short_conv + 1 :])
        for gradient, reference in zip(
            torch.autograd.grad((y, state.memory), leaves, (dy, ds)), gradients, strict=True
        ):
            exactly(gradient, reference)


def test_limits_do_something():
    x = tokens(11)
    assert (build()(x)[0] - build(time_step_limit=(0.3, 0.9))(x)[0]).abs().max() > 1e-3


def test_an_upper_limit_may_be_infinite():
    x = tokens(11)
    mixer = build(time_step_limit=(0.3, math.inf))
    assert mixer.decay(torch.full((1, 1, 4), -100.0, dtype=torch.float64))[0].eq(0.3).all()
    assert torch.equal(mixer(x)[0], build(time_step_limit=(0.3, 1000.0))(x)[0])
    assert torch.equal(build()(x)[0], build(time_step_limit=(0.0, math.inf))(x)[0])
    assert Mamba2Config.model_validate_json(mixer.config.model_dump_json()) == mixer.config


@every_paradigm
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_decays_without_a_limit_are_finite(paradigm, dtype):
    # steps of about 1,000 at rates of e^6: a log-decay of -4e5 a token, and exp of it is 0
    mixer = build(dtype)
    with torch.no_grad():
        mixer.decay.A_log.fill_(6.0)
        mixer.decay.dt_bias.fill_(1000.0)
    x = tokens(9, dtype=dtype).requires_grad_()
    y, state = mixer(x, paradigm=paradigm, return_state=True)
    gradients = torch.autograd.grad(y.float().sum() + state.memory.sum(), [x, *mixer.parameters()])
    assert all(part.isfinite().all() for part in (y, state.memory, *gradients))
    # nothing is left of earlier tokens but in the convolution
    memory = mixer(x[:, -mixer.config.short_conv :], paradigm=paradigm, return_state=True)[1].memory
    assert_close(state.memory, memory)


@every_paradigm
def test_steps_and_decays_are_wide_in_16_bits(paradigm):
    mixer, x = build(d_model=96, head_dim=48, chunk_size=64).bfloat16(), tokens(600, 1, torch.bfloat16, d_model=96)
    with torch.no_grad():
        mixer.decay.dt_bias.fill_(-7.0)  # steps of about 1e-3
    memory = mixer(x, paradigm=paradigm, return_state=True)[1].memory.double()
    exact = mixer.double()(x.double(), return_state=True)[1].memory
    # 7e-4; with steps of 16 bits it is 1.7e-3
    assert (memory - exact).norm() / exact.norm() <= 1.2e-3


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"head_dim": 0}, "greater than 0"),
        ({"short_conv": 1}, "greater than or equal to 2"),
        ({"a_range": (0.0, 1.0)}, r"a range needs 1e-06 <= lowest <= highest <= 1e\+06, and is \(0.0, 1.0\)"),
        ({"a_range": (1.0, 1e7)}, r"<= 1e\+06, and is \(1.0, 10000000.0\)"),
        ({"time_step_range": (0.2, 0.1)}, r"1e-06 <= lowest <= highest <= 1000, and is \(0.2, 0.1\)"),
        ({"time_step_range": (1e-7, 0.1)}, r"1e-06 <= lowest <= highest <= 1000, and is \(1e-07, 0.1\)"),
        ({"time_step_limit": (0.1, 0.1)}, r"step size need 0 <= lowest < highest <= 1000, .* and are \(0.1, 0.1\)"),
        ({"time_step_limit": (0.1, 2e3)}, r"<= 1000, or .inf for no highest, and are \(0.1, 2000.0\)"),
        ({"time_step_limit": (0.1, float("nan"))}, "or .inf for no highest"),
        ({"time_step_limit": (float("inf"), float("inf"))}, "finite number"),
        ({"d_state": 10**20}, "less than or equal to 1048576"),
        ({"head_dim": 10**20}, "less than or equal to 1048576"),
        ({"n_groups": 10**20}, "less than or equal to 1048576"),
        ({"n_heads": 4}, "n_heads"),
    ],
)
def test_wrong_fields_are_refused(fields, sentence):
    with pytest.raises(ValidationError, match=sentence):
        Mamba2Config(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, r"heads of head_dim = 64 do not divide expand \* d_model = 2 \* 12 = 24 evenly: head_dim = 24 would"),
        (
            {"head_dim": 5, "expand": 0.3},
            r"5 do not divide expand .* = 0.3 \* 12 = 3.6 evenly: expand = 0.41.* would",
        ),
        ({"head_dim": 6, "n_groups": 3}, "n_groups = 3 does not divide the 4 heads .*: n_groups = 2 or 4 would"),
    ],
)
def test_widths_that_do_not_fit_are_refused(fields, sentence):
    with pytest.raises(ContractError, match=sentence):
        Mamba2Config(**fields).build(12, layer_idx=0, n_layers=1)


def test_weights_start_as_those_of_the_authors():
    config = Mamba2Config(head_dim=1, d_state=16, a_range=(2.0, 5.0), time_step_range=(1e-4, 10.0))
    mixer = config.build(400, layer_idx=0, n_layers=4)
    steps, rates = mixer.decay(torch.zeros(1, 1, mixer.n_heads))[0][0, 0], mixer.decay.A_log.exp()
    assert_close(torch.stack((steps.min(), steps.max())), torch.tensor([1e-4, 10]), rtol=5e-2, atol=0)
    assert (steps < 10**-1.5).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert_close(torch.stack((rates.min(), rates.mean(), rates.max())), torch.tensor([2, 3.5, 5]), rtol=2e-2, atol=0)
    bounds = {"in_proj": 400**-0.5, "out_proj": 800**-0.5 / 2}
    for name, bound in bounds.items():
        assert_close(getattr(mixer, name).weight.abs().max().item(), bound, rtol=1e-2, atol=0)
    assert mixer.D.eq(1).all()
    assert mixer.norm_weight.eq(1).all()


def test_heads_of_one_group_share_their_keys_without_a_copy():
    mixer, x = build(), tokens(9)[..., :5]
    assert mixer._by_head(x).data_ptr() == x.data_ptr()


@every_paradigm
@pytest.mark.parametrize(("length", "context"), [(1, 0), (9, 5)])
def test_flops_are_those_of_projections_and_heads(paradigm, length, context):
    mixer = build()
    projections = 2 * length * (mixer.in_proj.weight.numel() + mixer.out_proj.weight.numel())
    inner = decay_flops(paradigm, length, 5, 6, chunk_size=4, context=context)
    assert mixer.flops(length, paradigm, context) == projections + 4 * inner
