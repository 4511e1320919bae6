"""Decays: the schedules of fixed ones, what tokens choose, and the limits at which one mixer is another."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from formulas import D_MODEL, build, exactly, lightning_lambdas, projections, tokens

from seqmix.mixers import MIXERS, Paradigm

PARADIGMS = list(Paradigm)
DELTA = [Paradigm.CHUNKWISE, Paradigm.RECURRENT]


@pytest.fixture
def log_decay(monkeypatch):
    """What a mixer gives its op as the log-decays of a segment."""

    def of(mixer, x):
        seen, module = [], sys.modules[type(mixer).__module__]
        op = module.decay
        with monkeypatch.context() as patch:
            patch.setattr(module, "decay", lambda q, k, v, a, call: seen.append(a) or op(q, k, v, a, call))
            mixer(x)
        return seen[0]

    return of


@pytest.mark.parametrize("schedule", ["minimax", "transnormer"])
@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_decays_of_lightning_are_those_of_the_schedule(schedule, n_layers):
    found = []
    for layer in range(n_layers):
        mixer = build("lightning", schedule=schedule, layer_idx=layer, n_layers=n_layers, n_heads=4)
        found.append(mixer.log_decay())
        expected = lightning_lambdas(schedule, 4, layer, n_layers)
        exactly(found[-1].exp(), torch.tensor(expected, dtype=torch.float64), 1e-12)
    found = torch.stack(found)
    assert (found.diff(dim=0) >= 0).all()  # deeper layers remember longer
    if schedule == "minimax":
        assert (found < 0).all()
        assert (found.diff(dim=1) > 0).all()  # and later heads
    else:
        assert (found[:, 0] == 0).all()
        assert (found.diff(dim=1) < 0).all()


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_a_token_that_closes_the_gate_erases_what_came_before(paradigm):
    mixer = build("gated_retention", gate_logit_normalizer=1.0)
    with torch.no_grad():
        projections(mixer)["gamma"].zero_()[:, 0] = 1e4
    first, second, x = tokens(5), tokens(5).flip(1), tokens(3)
    for gate, erased in ((-1.0, True), (1.0, False)):
        x[:, 0, 0] = gate
        y = [mixer(torch.cat((before, x), 1), paradigm=paradigm)[0][:, 5:] for before in (first, second)]
        difference = (y[0] - y[1]).abs().max()
        assert difference < 1e-12 if erased else difference > 1e-3


@pytest.mark.parametrize("kind", ["gla", "gated_retention"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chosen_decays_are_wide(kind, dtype, log_decay):
    mixer, x = build(kind, dtype), tokens(3, 5, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        narrowed = log_decay(mixer, x)
    for a in (narrowed, log_decay(mixer, x)):
        assert a.dtype == torch.promote_types(dtype, torch.float32)
        assert ((a < 0) & (a > -1)).all()  # 1 in bfloat16


def test_decays_of_gla_start_near_those_of_a_gate_half_open(log_decay):
    mixer = MIXERS.resolve("gla")(n_heads=2).build(D_MODEL, layer_idx=0, n_layers=1)
    assert (log_decay(mixer, torch.zeros(1, 1, D_MODEL)).exp() - 0.5 ** (1 / 16)).abs().max() < 1e-6
    assert mixer.decay_proj.down.weight.shape == (16, D_MODEL)


@torch.no_grad()
def test_with_the_largest_beta_a_key_is_looked_up():
    # beta 1: what was written last under a key is what it reads, whatever was there
    mixer = build("delta_net", short_conv=None, n_heads=1, norm_eps=1e-12)
    rows = projections(mixer)
    rows["beta"].zero_()[:, 0] = 1e3
    rows["q"].copy_(rows["k"])
    x = tokens(6)
    x[..., 0] = 1
    v = F.silu(x @ rows["v"].T)
    expected = (v * v.square().mean(-1, keepdim=True).rsqrt() * mixer.norm.weight) @ mixer.out_proj.weight.T
    exactly(mixer(x)[0], expected, 1e-5)


@pytest.mark.parametrize("paradigm", DELTA)
def test_without_decay_it_is_a_gated_delta_net_and_with_all_of_it_tokens_are_alone(paradigm):
    mixer, x = build("gated_delta_net", expand_v=1.0, short_conv=None), tokens(9)
    other = build("delta_net", gate="swish", short_conv=None)
    weights = {name: x for name, x in mixer.state_dict().items() if name not in ("decay.A_log", "decay.dt_bias")}
    other.load_state_dict(weights | {"in_proj.weight": mixer.in_proj.weight[:-3]})
    with torch.no_grad():
        mixer.decay.A_log.fill_(-math.inf)
        exactly(mixer(x, paradigm=paradigm)[0], other(x)[0])
        mixer.decay.A_log.fill_(1e3)  # a log-decay of -inf at every token
        whole = mixer(x, paradigm=paradigm)[0]
        exactly(whole, torch.cat([mixer(x[:, t : t + 1])[0] for t in range(9)], 1))


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
@torch.no_grad()
def test_with_the_denominator_equal_values_are_returned(paradigm, feature_map):
    mixer = build("linear_attention", feature_map=feature_map, eps=1e-12)
    x, values = tokens(9), projections(mixer)["v"]
    x[..., 0] = 1.0
    values[:, 1:] = 0  # they see the constant input alone
    exactly(mixer(x, paradigm=paradigm)[0], (mixer.out_proj.weight @ values[:, 0]).expand(2, 9, -1))


LONG = [
    ("delta_net", 1000, 3e-2, {"n_heads": 2, "chunk_size": 64}),
    ("gated_delta_net", 1000, 3e-2, {"n_heads": 2, "chunk_size": 64}),
    # sums of weights reach 10^5, beyond float16, and their ratio is what counts
    ("linear_attention", 2000, 1.5e-2, {}),
    # before its norm the output leaves the range of float16
    ("lightning", 1500, 1.5e-2, {"schedule": "transnormer"}),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "length", "tolerance", "fields"), LONG, ids=[case[0] for case in LONG])
def test_low_precision_stays_near_over_many_tokens(kind, length, tolerance, fields, dtype):
    mixer, x = build(kind, d_model=96, **fields), tokens(length, 1, d_model=96)
    if kind in ("linear_attention", "lightning"):  # at their own start
        mixer.float().reset_parameters()
        mixer.double()
        x = 8 * x if kind == "lightning" else x
    with torch.no_grad():
        exact = mixer(x)[0]
        mixer.to(dtype)
        for paradigm in sorted(mixer.traits.paradigms):
            y = mixer(x.to(dtype), paradigm=paradigm)[0].double()
            assert (y - exact)[:, -100:].norm() / exact[:, -100:].norm() <= tolerance
