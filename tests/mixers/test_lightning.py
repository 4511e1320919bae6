"""The lightning attention layer against its formulas written out, its schedules, and its options."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from seqmix.mixers import ContractError, Paradigm
from seqmix.mixers.lightning import Lightning, LightningConfig

PARADIGMS = list(Paradigm)
D_MODEL = 12
SCHEDULES = ["minimax", "transnormer"]


def build(dtype=torch.float64, d_model=D_MODEL, layer_idx=1, n_layers=3, **fields):
    torch.manual_seed(0)
    config = LightningConfig(**{"n_heads": 3, "chunk_size": 4} | fields)
    mixer = config.build(d_model, layer_idx=layer_idx, n_layers=n_layers).to(dtype)
    torch.nn.init.uniform_(mixer.norm.weight, 0.5, 1.5)
    return mixer


def tokens(length, batch_size=2, d_model=D_MODEL):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, length, d_model, dtype=torch.float64, generator=generator)


def exactly(actual, expected, tolerance=1e-9):
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def decays(schedule, n_heads, layer, n_layers):
    """Each head's decay, in the papers' words; MiniMax-01's slopes are those of ALiBi."""
    if schedule == "transnormer":
        return [math.exp(-8 * h / n_heads * (1 - layer / n_layers)) for h in range(n_heads)]
    depth = layer / (n_layers - 1) if n_layers > 1 else 0
    return [math.exp(-((2 ** (-8 / n_heads)) ** (h + 1)) * (1 - depth + 1e-5)) for h in range(n_heads)]


def written_out(mixer: Lightning, x):
    """The layer token by token."""
    config = mixer.config
    *qkv, gate = (x @ w.T for w in mixer.in_proj.weight.split([*mixer.widths.values()]))
    q, k, v = ((y * torch.sigmoid(y)).unflatten(-1, (config.n_heads, -1)) for y in qkv)
    decay = x.new_tensor(decays(config.schedule, config.n_heads, mixer.layer_idx, mixer.n_layers))[:, None, None]
    state, rows = 0, []
    for t in range(x.shape[1]):
        state = decay * state + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append((q[:, t, :, :, None] * state).sum(2).flatten(1))
    output = torch.stack(rows, 1)
    output = output / (output.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * mixer.norm.weight
    return (torch.sigmoid(gate) * output) @ mixer.out_proj.weight.T


OPTIONS = {
    "defaults": {},
    "transnormer": {"schedule": "transnormer"},
    "one layer": {"layer_idx": 0, "n_layers": 1},
    "the last layer": {"layer_idx": 2, "norm_eps": 0.01},
    "widths": {"expand_k": 0.5, "expand_v": 2.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_output_and_gradients_are_the_formulas(name):
    mixer = build(**OPTIONS[name])
    x = tokens(11).requires_grad_()
    leaves = [x, *mixer.parameters()]
    expected = written_out(mixer, x)
    upstream = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, leaves, upstream)
    for paradigm in PARADIGMS:
        y, state = mixer(x, paradigm=paradigm)
        assert state is None
        exactly(y, expected)
        for gradient, reference in zip(torch.autograd.grad(y, leaves, upstream), expected_gradients, strict=True):
            exactly(gradient, reference)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_decays_are_those_of_the_schedule(schedule, n_layers):
    found = []
    for layer in range(n_layers):
        mixer = build(schedule=schedule, layer_idx=layer, n_layers=n_layers, n_heads=4)
        found.append(mixer.log_decay())
        exactly(found[-1].exp(), torch.tensor(decays(schedule, 4, layer, n_layers), dtype=torch.float64), 1e-12)
    found = torch.stack(found)
    assert (found.diff(dim=0) >= 0).all()  # deeper layers remember longer
    if schedule == "minimax":
        assert (found < 0).all()
        assert (found.diff(dim=1) > 0).all()  # and later heads
    else:
        assert (found[:, 0] == 0).all()
        assert (found.diff(dim=1) < 0).all()


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_where_nothing_decays(paradigm, dtype):
    # before its norm the output leaves the range of float16
    mixer, x = build(d_model=96, schedule="transnormer"), 8 * tokens(1500, 1, 96)
    exact = mixer(x)[0]
    y = mixer.to(dtype)(x.to(dtype), paradigm=paradigm)[0].double()
    assert (y - exact)[:, -100:].norm() / exact[:, -100:].norm() <= 1.5e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_state_is_as_declared(dtype):
    mixer = build(dtype, expand_v=2.0)
    y, state = mixer(tokens(3, 5).to(dtype), return_state=True)
    assert y.dtype == dtype
    for memory in (mixer.init_state(5).memory, state.memory):
        assert memory.shape == (5, 3, 4, 8)
        assert memory.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"schedule": "alibi"}, "'minimax' or 'transnormer'"),
        ({"n_heads": 0}, "greater than 0"),
        ({"norm_eps": -1.0}, "greater than or equal to 0"),
        ({"gamma": 0.9}, "gamma"),
    ],
)
def test_wrong_fields_are_refused(fields, sentence):
    with pytest.raises(ValidationError, match=sentence):
        LightningConfig(**{"n_heads": 2} | fields)


def test_heads_that_do_not_fit_the_model_are_refused():
    with pytest.raises(ContractError, match=r"5 heads do not divide expand_k \* d_model = 1 \* 12 = 12 evenly"):
        LightningConfig(n_heads=5).build(D_MODEL, layer_idx=0, n_layers=1)
