"""Token-dependent decays, and low precision over many tokens."""

import sys

import pytest
import torch
from mixer_formulas import D_MODEL, build, tokens

from seqmix.mixers import MIXERS
from seqmix.ops.runtime.recording import recorded


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


@pytest.mark.parametrize("kind", ["gla", "gated_retention"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_dependent_decays_are_at_least_float32_and_can_erase(kind, dtype, log_decay):
    mixer, x = build(kind, dtype), tokens(3, 5, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        narrowed = log_decay(mixer, x)
    for a in (narrowed, log_decay(mixer, x)):
        assert a.dtype == torch.promote_types(dtype, torch.float32)
        assert ((a < 0) & (a > -1)).all()  # 1 in bfloat16
    assert log_decay(mixer, 1e5 * x).min() < -100  # a gate that closes erases what came before


@pytest.mark.parametrize("kind", ["linear_attention", "mlstm"])
@pytest.mark.parametrize(("dtype", "given"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_quotient_mixers_request_float32_output_from_low_precision_inputs(kind, dtype, given):
    mixer, x = build(kind, torch.float32), tokens(3, 5, torch.float32)
    with torch.autocast("cpu", dtype), recorded() as calls:
        mixer(x)
    found = [(call.v.dtype, call.output.dtype) for call in calls if call.op == "decay"]
    assert found == [(given, torch.float32)]
    _, probe = mixer.kernels(dtype)
    assert (probe.dtype, probe.wide_output) == (given, True)


def test_gla_decays_start_at_a_half_open_gate(log_decay):
    mixer = MIXERS.resolve("gla")(n_heads=2).build(D_MODEL, layer_idx=0, n_layers=1)
    assert (log_decay(mixer, torch.zeros(1, 1, D_MODEL)).exp() - 0.5 ** (1 / 16)).abs().max() < 1e-6
    assert mixer.decay_proj.down.weight.shape == (16, D_MODEL)


LONG = [
    ("delta_net", 1000, 3e-2, {"n_heads": 2, "chunk_size": 64}),
    ("gated_delta_net", 1000, 3e-2, {"n_heads": 2, "chunk_size": 64}),
    ("kda", 1000, 3e-2, {"n_heads": 2, "chunk_size": 64}),
    ("gated_delta_net2", 1000, 3e-2, {"n_heads": 2, "chunk_size": 64}),
    ("comba", 1000, 3e-2, {"n_heads": 2, "chunk_size": 64}),
    ("delta_product", 1000, 3e-2, {"n_heads": 2, "chunk_size": 64}),
    # sums of weights reach 10^5, beyond float16, and their ratio is what counts
    ("linear_attention", 2000, 1.5e-2, {}),
    # before its norm the output leaves the range of float16
    ("lightning", 1500, 1.5e-2, {"schedule": "transnormer"}),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "length", "tolerance", "fields"), LONG, ids=[case[0] for case in LONG])
def test_low_precision_error_stays_small_over_many_tokens(kind, length, tolerance, fields, dtype):
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
