"""The GLA layer against its formulas written out, its options, and what its decays cost."""

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from seqmix.mixers import ContractError, Paradigm
from seqmix.mixers import gla as module
from seqmix.mixers.gla import GLA, GLAConfig
from seqmix.ops.decay import decay_flops, decay_recurrence
from seqmix.testing.counting import count_flops

PARADIGMS = list(Paradigm)
D_MODEL = 12


def build(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    config = GLAConfig(**{"n_heads": 2, "chunk_size": 4, "gate_rank": 3} | fields)
    mixer = config.build(D_MODEL, layer_idx=0, n_layers=1).to(dtype)
    torch.nn.init.normal_(mixer.decay_proj.up.bias)
    torch.nn.init.uniform_(mixer.norm.weight, 0.5, 1.5)
    return mixer


def tokens(length, batch_size=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, length, D_MODEL, dtype=torch.float64, generator=generator).to(dtype)


def exactly(actual, expected, tolerance=1e-9):
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def written_out(mixer: GLA, x):
    """The layer token by token."""
    config, up = mixer.config, mixer.decay_proj.up
    q, k, v, gate = (
        (x @ w.T).unflatten(-1, (config.n_heads, -1)) for w in mixer.in_proj.weight.split([*mixer.widths.values()])
    )
    logits = x @ mixer.decay_proj.down.weight.T @ up.weight.T + up.bias
    alpha = (1 / (1 + (-logits).exp())) ** (1 / config.gate_logit_normalizer)
    alpha = alpha.unflatten(-1, (config.n_heads, -1))
    state, rows = 0, []
    for t in range(x.shape[1]):
        state = alpha[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
        rows.append((q[:, t, ..., None] * state).sum(2) / mixer.key_dim**0.5)
    output = torch.stack(rows, 1)
    output = output / (output.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * mixer.norm.weight
    return (gate * torch.sigmoid(gate) * output).flatten(2) @ mixer.out_proj.weight.T


OPTIONS = {
    "defaults": {},
    "short memories": {"gate_logit_normalizer": 0.1},
    "widths": {"expand_k": 1.0, "expand_v": 2.0, "norm_eps": 0.01},
    "odd chunks": {"chunk_size": 7, "n_heads": 3, "gate_rank": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_output_and_gradients_are_the_formulas(name):
    mixer = build(**OPTIONS[name])
    x = tokens(20).requires_grad_()
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


@pytest.fixture
def log_decay(monkeypatch):
    """What a mixer gives its op for the log-decays of a segment."""
    seen, decay = [], module.decay
    monkeypatch.setattr(module, "decay", lambda q, k, v, a, call: seen.append(a) or decay(q, k, v, a, call))
    return lambda mixer, x: (mixer(x), seen.pop())[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_decays_and_the_state_are_wide(dtype, log_decay):
    mixer = build(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    x = tokens(3, 5, dtype)
    for state in (mixer.init_state(5), mixer(x, return_state=True)[1]):
        assert state.memory.shape == (5, 2, 3, 6)
        assert state.memory.dtype == wide
    with torch.autocast("cpu", torch.bfloat16):
        a = log_decay(mixer, x)
    assert a.dtype == log_decay(mixer, x).dtype == wide
    assert ((a < 0) & (a > -1)).all()


def test_decays_start_near_those_of_a_gate_half_open(log_decay):
    mixer = GLAConfig(n_heads=2).build(D_MODEL, layer_idx=0, n_layers=1)
    assert (log_decay(mixer, torch.zeros(1, 1, D_MODEL)).exp() - 0.5 ** (1 / 16)).abs().max() < 1e-6
    assert mixer.decay_proj.down.weight.shape == (16, D_MODEL)


@pytest.mark.parametrize("length", [1, 7, 16, 17, 40])
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 64])
def test_flops_of_decays_a_key_dimension_are_what_a_counter_counts(length, chunk_size):
    q, k, a = (-torch.rand(1, length, 1, 3) for _ in range(3))
    v = torch.rand(1, length, 1, 2)
    counted = count_flops(lambda: decay_recurrence(q, k, v, a, chunk_size=chunk_size))
    assert counted == decay_flops(Paradigm.CHUNKWISE, length, 3, 2, chunk_size=chunk_size, key_decays=True)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"gate_logit_normalizer": 0.0}, "greater than or equal to 0.001"),
        ({"gate_rank": 0}, "greater than 0"),
        ({"gate_rank": 10**20}, "less than or equal to 1048576"),
        ({"n_heads": 0}, "greater than 0"),
        ({"gamma": 0.9}, "gamma"),
        ({"rotation": "rope"}, "Input should be 'none'"),
    ],
)
def test_wrong_fields_are_refused(fields, sentence):
    with pytest.raises(ValidationError, match=sentence):
        GLAConfig(**{"n_heads": 2} | fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"n_heads": 4}, r"4 heads do not divide expand_k \* d_model = 0.5 \* 12 = 6 evenly: n_heads = 3 or 6 would"),
        ({"n_heads": 9}, "n_heads = 6 would"),
        ({"n_heads": 2, "expand_k": 0.7}, "0.7 .* 12 = 8.4 evenly: expand_k = 0.6666666667 or 0.8333333333 would"),
        ({"n_heads": 2, "expand_v": 1e-9}, "expand_v = 0.1666666667 would"),
    ],
)
def test_heads_that_do_not_fit_the_model_are_refused(fields, sentence):
    with pytest.raises(ContractError, match=sentence):
        GLAConfig(**fields).build(D_MODEL, layer_idx=0, n_layers=1)


@pytest.mark.parametrize("expand", [0.6666666667, 0.8333333333, 0.1666666667])
def test_a_width_that_an_error_names_is_taken(expand):
    GLAConfig(n_heads=2, expand_k=expand).build(D_MODEL, layer_idx=0, n_layers=1)
