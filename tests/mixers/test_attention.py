"""The attention layer against its written-out formula, and its state."""

import math

import pytest
import torch
from mixer_formulas import assert_follows

from seqmix.mixers.attention import Attention, AttentionConfig
from seqmix.ops.attention import GrowingCache, RingCache
from seqmix.registry import ConfigError, SeqmixError

D_MODEL = 24


def build(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    config = AttentionConfig(**{"n_heads": 4, "n_kv_heads": 2, "chunk_size": 3} | fields)
    return config.build(D_MODEL, layer_idx=0, n_layers=1).to(dtype)


def tokens(length, batch_size=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, length, D_MODEL, dtype=dtype, generator=generator)


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x, config):
    """Complex rotations, and xPos as its authors' code computes it (torchscale): queries, and keys."""
    length, dims = x.shape[1], round(config.partial_rotary_factor * x.shape[-1])
    pairs = torch.arange(0, dims, 2, dtype=x.dtype)
    angles = torch.arange(length, dtype=x.dtype)[:, None] * config.rope_base ** -(pairs / dims)
    magnitude = torch.ones_like(angles)
    if config.positions == "xpos":
        zeta = (pairs + 0.4 * dims) / (1.4 * dims)
        magnitude = zeta ** ((torch.arange(length, dtype=x.dtype) - length // 2)[:, None] / 512)
    first = torch.view_as_complex(x[..., :dims].unflatten(-1, (-1, 2)).contiguous())
    turns = (torch.polar(m, angles)[:, None] for m in (magnitude, 1 / magnitude))
    return [torch.cat((torch.view_as_real(first * turn).flatten(-2), x[..., dims:]), -1) for turn in turns]


def slopes(n_heads):
    """As ALiBi's paper has them: halves of halves where heads are a power of 2, else the next power's in between."""
    if n_heads & (n_heads - 1) == 0:
        return [2 ** (-8 * (h + 1) / n_heads) for h in range(n_heads)]
    below = 2 ** math.floor(math.log2(n_heads))
    return slopes(below) + slopes(2 * below)[::2][: n_heads - below]


def written_out(mixer: Attention, x):
    """The layer from position 0."""
    config, length = mixer.config, x.shape[1]
    parts = dict(zip(mixer.widths, mixer.in_proj(x).split(list(mixer.widths.values()), dim=-1), strict=True))
    if config.short_conv:
        y, taps = torch.cat([parts[name] for name in "qkv"], -1), mixer.convolution.weight
        padded = torch.cat((torch.zeros_like(y[:, : config.short_conv - 1]), y), 1)
        y = sum(taps[:, i] * padded[:, i : i + length] for i in range(config.short_conv))
        parts |= dict(zip("qkv", y.split([mixer.widths[name] for name in "qkv"], -1), strict=True))
    q, k, v = (parts[name].unflatten(-1, (-1, mixer.head_dim)) for name in "qkv")
    if config.qk_norm != "none":
        norm, one = mixer.qk_norm, float(config.qk_norm == "rms_zero_centered")
        if config.qk_norm == "rms_all_heads":
            q, k = q.flatten(2), k.flatten(2)
        q, k = (rms(y, one + w.flatten(), config.norm_eps) for y, w in ((q, norm.q_weight), (k, norm.k_weight)))
        q, k = (y.view(*x.shape[:2], -1, mixer.head_dim) for y in (q, k))
    if config.qk_gain is not None:
        q = q * mixer.qk_gain[:, None]
    if config.positions in ("rope", "xpos"):
        q, k = turned(q, config)[0], turned(k, config)[1]
    queries = 1 + config.differential  # per output head
    k, own = (y.repeat_interleave(mixer.n_heads // mixer.n_kv_heads, dim=2) for y in (k, v))
    k, v = (y.repeat_interleave(queries, dim=2) for y in (k, own))
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) / math.sqrt(mixer.head_dim)
    if config.softcap is not None:
        scores = config.softcap * (scores / config.softcap).tanh()
    distance = torch.arange(length)[:, None] - torch.arange(length)
    if config.positions == "alibi":
        of_query = [slope for slope in slopes(mixer.n_heads) for _ in range(queries)]
        scores = scores - x.new_tensor(of_query)[:, None, None] * distance
    if config.forget_gate:
        gates = 1 / (1 + (-parts["forget"] - mixer.forget_bias).exp())  # of later tokens up to the query's own
        later = [[gates[:, m + 1 : n + 1].prod(1) for m in range(length)] for n in range(length)]
        scores = scores + torch.stack([torch.stack(row, -1) for row in later], -2).log()
    visible = (distance >= 0) & (distance < (config.window or length))
    weights = scores.masked_fill(~visible, -math.inf).exp()
    total = weights.sum(-1, keepdim=True) + (mixer.sinks.exp()[:, None, None] if config.sinks else 0)
    o = torch.einsum("bhnm,bmhv->bnhv", weights / total, v)
    if config.differential:
        pairs = o.unflatten(2, (-1, 2))
        o = pairs[..., 0, :] - pairs[..., 1, :] / (1 + (-parts["share"]).exp())[..., None]
    if config.exclusive != "none":
        share = torch.ones(mixer.n_heads) if mixer.exclusion is None else mixer.exclusion.tanh()
        direction = own / own.norm(dim=-1, keepdim=True)
        o = o - share[:, None] * (o * direction).sum(-1, keepdim=True) * direction
    o = o.flatten(2)
    if config.gate != "none":
        o = o * parts["gate"].sigmoid() * (parts["gate"] if config.gate == "swish" else 1)
    return mixer.out_proj(o)


@pytest.mark.parametrize("positions", ["rope", "xpos", "none"])
@pytest.mark.parametrize("fields", [{}, {"n_kv_heads": None}, {"n_kv_heads": 1}, {"head_dim": 10, "rope_base": 100.0}])
@pytest.mark.parametrize("window", [None, 4])
def test_output_and_gradients_match_written_out_formula(positions, fields, window):
    mixer = build(positions=positions, window=window, **fields)
    assert_follows(mixer, lambda mixer, x: (written_out(mixer, x),), tokens(11))


OPTIONS = [
    {"positions": "alibi"},
    {"positions": "alibi", "n_heads": 6, "softcap": 0.5},
    {"forget_gate": True},
    {"forget_gate": True, "positions": "none", "gate": "swish"},
    {"forget_gate": True, "positions": "alibi", "sinks": True, "qk_norm": "rms"},
    {"sinks": True},
    {"softcap": 0.5, "positions": "xpos"},
    {"gate": "sigmoid"},
    {"exclusive": "full", "gate": "sigmoid"},
    {"exclusive": "learned", "sinks": True},
    {"differential": True},
    {"differential": True, "exclusive": "learned", "gate": "sigmoid", "qk_norm": "rms_all_heads"},
    {"differential": True, "positions": "alibi", "forget_gate": True, "sinks": True, "n_heads": 6},
    {"qk_norm": "rms", "norm_eps": 0.1, "partial_rotary_factor": 0.5, "head_dim": 8},
    {"qk_norm": "rms_zero_centered", "positions": "none"},
    {"qk_norm": "rms", "qk_gain": 5.0, "softcap": 3.0},
    {"qk_norm": "rms_all_heads", "norm_eps": 0.1},
    {"short_conv": 3},
    {"short_conv": 2, "qk_norm": "rms", "forget_gate": True, "differential": True, "n_heads": 4},
    {
        **{"forget_gate": True, "sinks": True, "softcap": 1.0, "gate": "sigmoid", "qk_norm": "rms"},
        **{"partial_rotary_factor": 0.25, "head_dim": 8},
    },
]


@pytest.mark.parametrize("fields", OPTIONS, ids=lambda fields: "-".join(map(str, fields)))
@pytest.mark.parametrize("window", [None, 4])
def test_options_match_written_out_formula(window, fields):
    mixer = build(window=window, **fields)
    norms = mixer.qk_norm or torch.nn.Module()
    for parameter in (mixer.sinks, mixer.forget_bias, mixer.exclusion, *norms.parameters()):
        if parameter is not None:  # none that is all ones or zeros, which would hide that it is there
            torch.nn.init.normal_(parameter)
    assert_follows(mixer, lambda mixer, x: (written_out(mixer, x),), tokens(11))


def test_exclusive_outputs_are_orthogonal_to_the_tokens_own_values():
    mixer = build(exclusive="full")
    with torch.no_grad():
        mixer.out_proj.weight.copy_(torch.eye(mixer.n_heads * mixer.head_dim, mixer.out_proj.out_features).T)
    mixed = []
    mixer.out_proj.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0]))
    x = tokens(9)
    mixer(x)
    values = mixer.in_proj(x).split(list(mixer.widths.values()), -1)[2].unflatten(-1, (mixer.n_kv_heads, -1))
    values = values.repeat_interleave(mixer.n_heads // mixer.n_kv_heads, 2)
    products = (mixed[0].unflatten(-1, (mixer.n_heads, -1)) * values).sum(-1)
    assert products.abs().max() < 1e-12
    assert mixed[0][:, 0].abs().max() < 1e-12  # it sees its own value alone
    assert mixed[0][:, 1:].abs().max() > 0.1


def test_learned_exclusion_has_no_effect_at_initialisation():
    x = tokens(9)
    mixer, plain = build(exclusive="learned"), build()
    plain.load_state_dict({name: value for name, value in mixer.state_dict().items() if name != "exclusion"})
    assert torch.equal(mixer(x)[0], plain(x)[0])


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_differential_attention_with_equal_query_pairs_scales_plain_attention(n_kv_heads):
    x = tokens(9)
    mixer, plain = build(differential=True, n_kv_heads=n_kv_heads), build(n_kv_heads=n_kv_heads)
    rows = mixer.in_proj.weight.detach().split(list(mixer.widths.values()))
    queries = rows[0].unflatten(0, (mixer.n_heads, 2, -1))
    with torch.no_grad():
        queries[:, 1] = queries[:, 0]  # writes into the projection
        plain.in_proj.weight.copy_(torch.cat((queries[:, 0].flatten(0, 1), *rows[1:3])))
    mixed = []
    for each in (mixer, plain):
        each.out_proj.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0]))
        each(x)
    rest = 1 - (x @ rows[3].T).sigmoid()
    expected = mixed[1].unflatten(-1, (mixer.n_heads, -1)) * rest[..., None]
    torch.testing.assert_close(mixed[0], expected.flatten(2), rtol=1e-12, atol=1e-12)


def test_differential_attention_has_one_projection_per_output_head():
    mixer = build(differential=True)
    shapes = {role: view.shape[:2] for role, view in mixer.projections.items()}
    assert shapes == {"q": (4, 6), "k": (2, 6), "v": (2, 6), "o": (4, 6)}
    with torch.no_grad():
        mixer.projections["q"].zero_()  # the heads that the output adds
    queries = mixer.in_proj.weight[: mixer.widths["q"]].unflatten(0, (4, 2, -1))
    assert not queries[:, 0].any()
    assert queries[:, 1].any()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"partial_rotary_factor": 0.5}, "0.3333333333 or 0.6666666667"),  # of 6 dimensions
        ({"partial_rotary_factor": 0.1}, "0.3333333333"),
        ({"partial_rotary_factor": 0.5, "positions": "xpos"}, "partial_rotary_factor .* rope"),
        ({"window": 1, "forget_gate": True, "qk_norm": "rms"}, "forget_gate and qk_norm .* 2"),
        ({"window": 1, "exclusive": "full"}, "exclusive = full .* window >= 2"),
    ],
)
def test_incompatible_options_raise(fields, named):
    with pytest.raises(SeqmixError, match=named):
        build(**fields)


@pytest.mark.parametrize("fields", [{"forget_gate": True}, {"positions": "alibi"}, {"softcap": 1.0}, {"sinks": True}])
def test_resolving_a_backend_that_lacks_an_option_raises(fields):
    mixer = build(backend="flex", dtype=torch.float32, **fields)
    with pytest.raises(SeqmixError, match="flex does not support"):
        mixer.resolve_backend(torch.float32)


def test_forget_gates_stay_float32_in_bfloat16_cache():
    mixer = build(forget_gate=True, dtype=torch.bfloat16)
    for state in (mixer.init_state(3), mixer(tokens(7, 3, torch.bfloat16), return_state=True)[1]):
        assert state.cache.keys.dtype == torch.bfloat16
        assert state.log_forget.dtype == torch.float32
        assert state.log_forget.shape == (*state.cache.keys.shape[:2], mixer.n_heads)


@pytest.mark.parametrize(
    ("window", "max_length", "kind", "capacity"),
    [
        (None, None, GrowingCache, 0),
        (None, 9, RingCache, 9),
        (5, None, RingCache, 5),
        (5, 9, RingCache, 5),
        (5, 3, RingCache, 3),
    ],
)
def test_state_has_declared_type_shape_and_dtype(window, max_length, kind, capacity):
    mixer = build(window=window, dtype=torch.bfloat16)
    state = mixer.init_state(3, max_length=max_length)
    assert type(state) is kind
    assert state.keys.shape == state.values.shape == (3, capacity, 2, 6)
    assert state.keys.dtype == state.values.dtype == torch.bfloat16
    assert state.length.dtype == torch.int64
    assert mixer.traits.state == ("growing" if window is None else "constant")
    _, after = mixer(tokens(7, batch_size=3, dtype=torch.bfloat16), return_state=True)
    assert after.keys.shape[1] == (7 if window is None else 5)
    if max_length == capacity:
        with pytest.raises(RuntimeError, match="max_length"):
            mixer(tokens(10, batch_size=3, dtype=torch.bfloat16), state, return_state=True)


def test_qk_gain_of_one_leaves_attention_unchanged():
    plain, gained = build(qk_norm="rms"), build(qk_norm="rms", qk_gain=1.0)
    gained.load_state_dict({**plain.state_dict(), "qk_gain": gained.qk_gain.detach()})
    assert torch.equal(gained.qk_gain, torch.ones(4, dtype=torch.float64))
    assert torch.equal(gained(tokens(9))[0], plain(tokens(9))[0])
    with pytest.raises(ConfigError, match="qk_gain = 2 needs qk_norm, got none"):
        build(qk_gain=2.0)
