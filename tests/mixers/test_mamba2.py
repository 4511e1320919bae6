"""The Mamba-2 layer against its written-out recurrence, and its options."""

import math

import pytest
import torch
from kit_definitions import defined
from mixer_formulas import D_MODEL, assert_follows, convolved, rms, tokens
from recorded_operations import Watched
from torch.testing import assert_close

from seqmix.mixers import Paradigm
from seqmix.mixers.mamba2 import Mamba2Config

PARADIGMS = list(Paradigm)
every_paradigm = pytest.mark.parametrize("paradigm", PARADIGMS)


def build(dtype=torch.float64, d_model=D_MODEL, **fields):
    torch.manual_seed(0)
    config = Mamba2Config(**{"head_dim": 6, "d_state": 5, "chunk_size": 4} | fields)
    mixer = config.build(d_model, layer_idx=0, n_layers=1).to(dtype)
    with torch.no_grad():
        for parameter in (mixer.D, mixer.norm_weight, mixer.decay.dt_bias):  # ones and small steps would hide errors
            parameter.add_(torch.randn_like(parameter))
    return mixer


def written_out(mixer, x):
    """Output and final state from an empty state."""
    config = mixer.config
    values, keys = mixer.n_heads * config.head_dim, config.n_groups * config.d_state
    z, u, b, c, dt = (x @ mixer.in_proj.weight.T).split([values, values, keys, keys, mixer.n_heads], -1)
    mixed = torch.cat((u, b, c), -1)
    if mixer.convolution is not None:
        mixed = mixer.convolution.bias + convolved(mixed, mixer.convolution.weight)
    u, b, c = (mixed * mixed.sigmoid()).split([values, keys, keys], -1)
    dt = (1 + (dt + mixer.decay.dt_bias).exp()).log()
    if config.time_step_limit is not None:
        dt = dt.clamp(*config.time_step_limit)
    group = mixer.n_heads // config.n_groups
    v = u.unflatten(-1, (mixer.n_heads, -1))
    key, query = (part.unflatten(-1, (config.n_groups, -1)).repeat_interleave(group, 2) for part in (b, c))
    log_decay = -dt * mixer.decay.A_log.exp()
    y, state = defined("decay", q=query, k=key * dt[..., None], v=v, log_decay=log_decay)
    y = y + mixer.D[:, None] * v
    gated = (y.flatten(2) * z * z.sigmoid()).unflatten(-1, (config.n_groups, -1))
    y = (rms(gated, config.norm_eps).flatten(2) * mixer.norm_weight) @ mixer.out_proj.weight.T
    return y, state


OPTIONS = {
    "defaults": {},
    "groups": {"n_groups": 2, "norm_eps": 0.1},
    "one head": {"head_dim": 24, "short_conv": 2},
    "limits": {"time_step_limit": (0.3, 0.9)},
    "widths": {"expand": 0.5, "d_state": 7, "short_conv": 3},
    "no convolution": {"short_conv": None},
    "silu and a weight per channel": {"short_conv": 1, "n_groups": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_output_state_and_gradients_match_written_out_formulas(name):
    assert_follows(build(**OPTIONS[name]), written_out, tokens(11))


@pytest.mark.parametrize("n_groups", [1, 2])
def test_group_tensors_are_not_expanded_to_heads(n_groups):
    mixer = build(torch.float32, 64, head_dim=4, d_state=32, n_groups=n_groups, chunk_size=64)
    with Watched() as watched:
        mixer(tokens(256, 1, torch.float32, d_model=64))[0].sum().backward()
    assert watched.largest < 256 * mixer.n_heads * 32


def test_time_step_upper_limit_may_be_infinite():
    x = tokens(11)
    mixer = build(time_step_limit=(0.3, math.inf))
    assert mixer.decay(torch.full((1, 1, 4), -100.0, dtype=torch.float64))[0].eq(0.3).all()
    assert torch.equal(mixer(x)[0], build(time_step_limit=(0.3, 1000.0))(x)[0])
    assert torch.equal(build()(x)[0], build(time_step_limit=(0.0, math.inf))(x)[0])
    assert Mamba2Config.model_validate_json(mixer.config.model_dump_json()) == mixer.config


@every_paradigm
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_very_strong_decays_give_finite_outputs_and_gradients(paradigm, dtype):
    # steps of about 1,000 at rates of e^6: a log-decay of -4e5 per token, and exp of it is 0
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
def test_bfloat16_model_computes_steps_and_decays_precisely(paradigm):
    mixer, x = build(d_model=96, head_dim=48, chunk_size=64).bfloat16(), tokens(600, 1, torch.bfloat16, d_model=96)
    with torch.no_grad():
        mixer.decay.dt_bias.fill_(-7.0)  # steps of about 1e-3
    memory = mixer(x, paradigm=paradigm, return_state=True)[1].memory.double()
    exact = mixer.double()(x.double(), return_state=True)[1].memory
    # 7e-4; with steps of 16 bits it is 1.7e-3
    assert (memory - exact).norm() / exact.norm() <= 1.2e-3
