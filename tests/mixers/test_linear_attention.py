"""The linear attention layer against its formulas written out, and its options."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from seqmix.mixers import ContractError, Paradigm
from seqmix.mixers.linear_attention import LinearAttention, LinearAttentionConfig
from seqmix.ops.decay import decay_flops

PARADIGMS = list(Paradigm)
D_MODEL = 12


def build(dtype=torch.float64, d_model=D_MODEL, **fields):
    torch.manual_seed(0)
    config = LinearAttentionConfig(**{"n_heads": 3, "chunk_size": 4} | fields)
    return config.build(d_model, layer_idx=0, n_layers=1).to(dtype)


def tokens(length, batch_size=2, dtype=torch.float64, d_model=D_MODEL):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, length, d_model, dtype=torch.float64, generator=generator).to(dtype)


def exactly(actual, expected, tolerance=1e-9):
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def written_out(mixer: LinearAttention, x):
    """The layer from position 0: explicit weights of all pairs."""
    config = mixer.config
    q, k, v = (
        (x @ w.T).unflatten(-1, (config.n_heads, -1)) for w in mixer.in_proj.weight.split([*mixer.widths.values()])
    )
    phi = {
        "elu": lambda y: torch.where(y > 0, y + 1, y.clamp(max=0).exp()),
        "relu": lambda y: y.clamp(min=0),
        "softmax": lambda y: y.exp() / y.exp().sum(-1, keepdim=True),
        "identity": lambda y: y,
    }[config.feature_map]
    q, k = phi(q), phi(k)
    if config.rotation != "none":  # phi first: what is turned sees distances alone
        theta = config.rotation_base ** -(torch.arange(mixer.key_dim // 2) / (mixer.key_dim // 2)).double()
        turn = torch.polar(torch.ones(()).double(), torch.arange(x.shape[1])[:, None] * theta)[:, None]
        q, k = (torch.view_as_real(torch.complex(y[..., ::2], y[..., 1::2]) * turn).flatten(-2) for y in (q, k))
    weights = torch.einsum("bnhk,bmhk->bhnm", q, k).tril()
    if config.denominator:
        weights = weights / (weights.sum(-1, keepdim=True) + config.eps)
    else:
        weights = weights / math.sqrt(mixer.key_dim)
    output = torch.einsum("bhnm,bmhv->bnhv", weights, v)
    if config.head_norm == "group":
        output = output - output.mean(-1, keepdim=True)
    if config.head_norm != "none":
        output = output / (output.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return output.flatten(2) @ mixer.out_proj.weight.T


OPTIONS = {
    "defaults": {},
    "relu": {"feature_map": "relu", "eps": 0.1},
    "softmax": {"feature_map": "softmax"},
    "no denominator": {"denominator": False},
    "identity": {"denominator": False, "feature_map": "identity", "head_norm": "rms", "norm_eps": 0.01},
    "group": {"head_norm": "group", "norm_eps": 0.01},
    "turned": {"denominator": False, "rotation": "rope", "rotation_base": 100.0},
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


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_the_state_is_the_sum_and_its_last_column_the_sum_of_keys(paradigm):
    mixer = build(feature_map="softmax")
    x = tokens(7)
    k, v = ((x @ w.T).unflatten(-1, (3, -1)) for w in mixer.in_proj.weight.split([*mixer.widths.values()])[1:])
    _, state = mixer(x, paradigm=paradigm, return_state=True)
    exactly(state.memory[..., :-1], torch.einsum("bthk,bthv->bhkv", k.softmax(-1), v))
    exactly(state.memory[..., -1], k.softmax(-1).sum(1))


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
def test_with_the_denominator_equal_values_are_returned(paradigm, feature_map):
    mixer = build(feature_map=feature_map, eps=1e-12)
    x = tokens(9)
    x[..., 0] = 1.0
    with torch.no_grad():
        # values see the constant input alone
        mixer.in_proj.weight[24:, 1:] = 0
    value = mixer.in_proj.weight[24:, 0]
    exactly(mixer(x, paradigm=paradigm)[0], (mixer.out_proj.weight @ value).expand(2, 9, -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("denominator", [False, True])
def test_the_state_is_as_declared(dtype, denominator):
    mixer = build(dtype, denominator=denominator, expand_v=2.0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for state in (mixer.init_state(5), mixer(tokens(3, 5, dtype), return_state=True)[1]):
        assert state.memory.shape == (5, 3, 4, 8 + denominator)
        assert state.memory.dtype == wide


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("length", [1, 9])
def test_autocast_keeps_the_state_wide(paradigm, length):
    mixer = build(torch.float32)
    x = tokens(length + 4, dtype=torch.float32)
    exact = written_out(mixer.double(), x.double())
    mixer.float()
    with torch.autocast("cpu", torch.bfloat16):
        _, state = mixer(x[:, :4], paradigm=paradigm, return_state=True)
        y, state = mixer(x[:, 4:], state, paradigm=paradigm, return_state=True)
    assert state.memory.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert_close(y.double(), exact[:, 4:], rtol=5e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_low_precision_stays_near_over_many_tokens(paradigm, dtype):
    # sums of weights reach 10^5, beyond float16, and their ratio is what counts
    mixer, x = build(d_model=96), tokens(2000, 1, d_model=96)
    exact = mixer(x)[0]
    y = mixer.to(dtype)(x.to(dtype), paradigm=paradigm)[0].double()
    assert (y - exact)[:, -100:].norm() / exact[:, -100:].norm() <= 1.5e-2


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"feature_map": "identity"}, "a denominator needs weights that are never negative; feature_map is identity"),
        ({"rotation": "rope"}, "a denominator needs weights that are never negative; rotation is rope"),
        ({"feature_map": "exp"}, "'elu', 'relu', 'softmax' or 'identity'"),
        ({"eps": 0.0}, "greater than 0"),
        ({"n_heads": 0}, "greater than 0"),
        ({"chunk_size": 0}, "greater than 0"),
        ({"gamma": 0.9}, "gamma"),
    ],
)
def test_wrong_fields_are_refused(fields, sentence):
    with pytest.raises(ValidationError, match=sentence):
        LinearAttentionConfig(**{"n_heads": 2} | fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"n_heads": 5}, r"5 heads do not divide expand_k \* d_model = 1 \* 12 = 12 evenly"),
        ({"n_heads": 4, "expand_v": 0.5}, r"4 heads do not divide expand_v \* d_model = 0.5 \* 12 = 6 evenly"),
    ],
)
def test_heads_that_do_not_fit_the_model_are_refused(fields, sentence):
    with pytest.raises(ContractError, match=sentence):
        LinearAttentionConfig(**fields).build(12, layer_idx=0, n_layers=1)


def test_weights_start_as_those_of_attention():
    mixer = build(d_model=240, n_heads=4, expand_v=2.0)
    weights = {2**-0.5: mixer.in_proj.weight.split([*mixer.widths.values()]), 1.0: [mixer.out_proj.weight]}
    for gain, matrices in weights.items():
        for weight in matrices:
            bound = gain * math.sqrt(6 / sum(weight.shape))
            assert_close(weight.abs().max().item(), bound, rtol=1e-2, atol=0)
    assert {name for name, _ in mixer.named_parameters()} == {"in_proj.weight", "out_proj.weight"}


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize(("length", "context"), [(1, 0), (1, 5), (9, 0), (9, 5)])
def test_flops_are_what_a_counter_counts(paradigm, denominator, length, context):
    mixer = build(denominator=denominator)
    state = mixer(tokens(context, 1), return_state=True)[1] if context else None
    with FlopCounterMode(display=False) as counter:
        mixer(tokens(length, 1), state, paradigm=Paradigm.PARALLEL)
    declared = {p: mixer.flops(length, p, context) for p in PARADIGMS}
    assert counter.get_total_flops() == declared[Paradigm.PARALLEL]
    # what the other two do between the projections is checked with the op
    inner = {p: 3 * decay_flops(p, length, 4, 4 + denominator, chunk_size=4, context=context) for p in PARADIGMS}
    assert declared[paradigm] - inner[paradigm] == declared[Paradigm.PARALLEL] - inner[Paradigm.PARALLEL]
