"""The attention layer: against its formulas written out, from every state, in every paradigm."""

import itertools
import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from seqmix.mixers.attention import Attention, AttentionConfig
from seqmix.mixers.traits import ContractError
from seqmix.ops.paradigm import Paradigm
from seqmix.ops.softmax import GrowingCache, RingCache

PARADIGMS = list(Paradigm)
D_MODEL = 24


def build(dtype=torch.float64, d_model=D_MODEL, **fields):
    torch.manual_seed(0)
    config = AttentionConfig(**{"n_heads": 4, "n_kv_heads": 2, "chunk_size": 3} | fields)
    return config.build(d_model, layer_idx=0, n_layers=1).to(dtype)


def tokens(length, batch_size=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, length, D_MODEL, dtype=dtype, generator=generator)


def exactly(actual, expected):
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def written_out(mixer: Attention, x):
    """The layer from position 0, with complex rotations and xPos as its authors' code computes it (torchscale)."""
    config, length = mixer.config, x.shape[1]
    q, k, v = (part.unflatten(-1, (-1, mixer.head_dim)) for part in mixer.in_proj(x).split(mixer.widths, dim=-1))
    if config.positions != "none":
        pairs = torch.arange(0, mixer.head_dim, 2, dtype=x.dtype)
        theta = config.rope_base ** -(pairs / mixer.head_dim)
        angles = torch.arange(length, dtype=x.dtype)[:, None] * theta
        magnitude = torch.ones_like(angles)
        if config.positions == "xpos":
            zeta = (pairs + 0.4 * mixer.head_dim) / (1.4 * mixer.head_dim)
            magnitude = zeta ** ((torch.arange(length, dtype=x.dtype) - length // 2)[:, None] / 512)
        turn = torch.polar(magnitude, angles)[:, None], torch.polar(1 / magnitude, angles)[:, None]
        pairwise = (torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) for y in (q, k))
        q, k = (torch.view_as_real(y * t).flatten(-2) for y, t in zip(pairwise, turn, strict=True))
    k, v = (y.repeat_interleave(mixer.n_heads // mixer.n_kv_heads, dim=2) for y in (k, v))
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) / math.sqrt(mixer.head_dim)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & (distance < (config.window or length))
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return mixer.out_proj(torch.einsum("bhnm,bmhv->bnhv", weights, v).flatten(2))


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("positions", ["rope", "xpos", "none"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("n_kv_heads", [None, 1, 2])
def test_output_is_the_formula(paradigm, positions, window, n_kv_heads):
    mixer = build(positions=positions, window=window, n_kv_heads=n_kv_heads)
    x = tokens(11)
    y, state = mixer(x, paradigm=paradigm)
    assert state is None
    exactly(y, written_out(mixer, x))


def test_head_dim_and_base_are_free():
    mixer = build(head_dim=10, rope_base=100.0)
    assert mixer.in_proj.weight.shape == (40 + 20 + 20, D_MODEL)
    exactly(mixer(tokens(7))[0], written_out(mixer, tokens(7)))


@pytest.mark.parametrize("max_length", [None, 13])
@pytest.mark.parametrize("positions", ["rope", "xpos"])
@settings(max_examples=20, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 12), max_size=3, unique=True).map(sorted),
    paradigms=st.lists(st.sampled_from(PARADIGMS), min_size=4, max_size=4),
    window=st.sampled_from([None, 1, 4, 20]),
    grad=st.booleans(),
)
def test_pieces_equal_the_whole(max_length, positions, cuts, paradigms, window, grad):
    mixer = build(positions=positions, window=window)
    x = tokens(13)
    state, outputs = mixer.init_state(2, max_length=max_length), []
    with torch.set_grad_enabled(grad):
        for piece, paradigm in zip(x.tensor_split(cuts, dim=1), paradigms, strict=False):
            y, state = mixer(piece, state, paradigm=paradigm, return_state=True)
            outputs.append(y)
    exactly(torch.cat(outputs, dim=1), written_out(mixer, x))
    assert_close(state.length, torch.tensor([13, 13]))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("positions", ["rope", "xpos"])
def test_ragged_prompts_are_packed_and_decoded_as_a_batch(positions, window):
    mixer = build(positions=positions, window=window)
    x = tokens(9, batch_size=3)
    lengths = [4, 0, 6]
    prompt = torch.cat([x[n, :length] for n, length in enumerate(lengths)])[None]
    borders = torch.tensor([0, 4, 4, 10])
    with torch.no_grad():
        y, state = mixer(prompt, cu_seqlens=borders, return_state=True, paradigm=Paradigm.CHUNKWISE)
        rows = [y[0, a:b] for a, b in itertools.pairwise(borders)]
        for step in range(3):
            piece = torch.stack([x[n, length + step] for n, length in enumerate(lengths)])[:, None]
            y, state = mixer.step(piece, state)
            rows = [torch.cat((row, new)) for row, new in zip(rows, y, strict=True)]
    whole = written_out(mixer, x)
    for n, row in enumerate(rows):
        exactly(row, whole[n, : lengths[n] + 3])


@pytest.mark.parametrize("positions", ["rope", "xpos", "none"])
def test_gradients_agree(positions):
    mixer = build(positions=positions)
    x = tokens(9).requires_grad_()
    leaves = [x, *mixer.parameters()]
    expected = torch.autograd.grad(written_out(mixer, x).square().sum(), leaves)
    for paradigm in PARADIGMS:
        gradients = torch.autograd.grad(mixer(x, paradigm=paradigm)[0].square().sum(), leaves)
        for gradient, expected_gradient in zip(gradients, expected, strict=True):
            exactly(gradient, expected_gradient)


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("positions", ["rope", "xpos", "none"])
def test_output_is_independent_of_absolute_position(paradigm, positions):
    mixer = build(positions=positions, window=4)
    _, state = mixer(tokens(4), return_state=True)
    outputs = []
    for read in (4, 4 + 1_000_000):
        keys, length = state.keys, state.length + (read - 4)
        if positions != "none":
            # the same keys, turned further
            pairs = torch.arange(0, mixer.head_dim, 2, dtype=torch.float64)
            angles = (read - 4) * mixer.config.rope_base ** -(pairs / mixer.head_dim)
            turned = torch.view_as_complex(keys.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
                torch.ones(3).double(), angles
            )
            keys = torch.view_as_real(turned).flatten(-2)
        outputs.append(mixer(tokens(6), RingCache(keys, state.values, length), paradigm=paradigm)[0])
    assert_close(outputs[1], outputs[0], rtol=1e-7, atol=1e-7)


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
def test_the_state_is_as_declared(window, max_length, kind, capacity):
    mixer = build(window=window, dtype=torch.bfloat16)
    state = mixer.init_state(3, max_length=max_length)
    assert type(state) is kind
    assert state.keys.shape == state.values.shape == (3, capacity, 2, 6)
    assert state.keys.dtype == state.values.dtype == torch.bfloat16
    assert state.length.dtype == torch.int64
    assert mixer.traits.state == ("growing" if window is None else "constant")
    _, after = mixer(tokens(7, batch_size=3, dtype=torch.bfloat16), return_state=True)
    assert after.keys.shape[1] == (7 if window is None else 5)


@pytest.mark.parametrize("window", [None, 5])
def test_more_than_max_length_is_refused(window):
    mixer = build(window=window)
    state = mixer.init_state(2, max_length=4)
    with pytest.raises(RuntimeError, match="allocated for fewer tokens"):
        mixer(tokens(5), state, return_state=True)


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("positions", ["rope", "xpos"])
def test_autocast_leaves_the_cache_its_dtype(paradigm, positions):
    mixer = build(dtype=torch.float32, positions=positions)
    x = tokens(6, dtype=torch.float32)
    exact = written_out(mixer.double(), x.double())
    mixer.float()
    for state in (mixer.init_state(2), mixer.init_state(2, max_length=6)):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            first, state = mixer(x[:, :4], state, paradigm=paradigm, return_state=True)  # noqa: PLW2901
            second, state = mixer(x[:, 4:], state, paradigm=paradigm, return_state=True)  # noqa: PLW2901
        assert state.keys.dtype == state.values.dtype == torch.float32
        assert first.dtype == torch.bfloat16
        assert_close(torch.cat((first, second), dim=1).double(), exact, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize(("length", "context"), [(7, 0), (7, 5), (1, 5)])
def test_flops_are_what_a_counter_counts(paradigm, window, length, context):
    mixer = build(window=window, positions="xpos")
    state = mixer(tokens(context, batch_size=1), return_state=True)[1] if context else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        mixer(tokens(length, batch_size=1), state, paradigm=paradigm, return_state=True)
    assert counter.get_total_flops() == mixer.flops(length, paradigm, context)


@pytest.mark.parametrize("positions", ["rope", "xpos"])
@pytest.mark.parametrize("window", [None, 6])
def test_decoding_compiles_once(positions, window):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    mixer = build(positions=positions, window=window)
    step = torch.compile(mixer.step, fullgraph=True, backend=counter)
    x = tokens(20)
    state, outputs = mixer.init_state(2, max_length=20), []
    with torch.no_grad():
        for t in range(20):
            y, state = step(x[:, t : t + 1], state)
            outputs.append(y)
    assert counter.frame_count == 1
    exactly(torch.cat(outputs, dim=1), written_out(mixer, x))


def test_weights_start_as_the_authors_transformer_does():
    mixer = build(d_model=240, n_heads=4, n_kv_heads=1)
    for weight, gain in (
        *((part, 2**-0.5) for part in mixer.in_proj.weight.split([240, 60, 60])),
        (mixer.out_proj.weight, 1.0),
    ):
        bound = gain * math.sqrt(6 / sum(weight.shape))
        assert weight.abs().max() <= bound
        assert_close(weight.abs().max().item(), bound, rtol=1e-2, atol=0)
    assert all(m.bias is None for m in mixer.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"n_heads": 4, "n_kv_heads": 3}, r"n_heads = 4, and 3 does not: choose one of \[1, 2, 4\]"),
        ({"n_heads": 4, "head_dim": 5}, "rope turns pairs of dimensions, so head_dim must be even, not 5"),
        ({"n_heads": 0}, "greater than 0"),
        ({"n_heads": 4, "window": 0}, "greater than 0"),
        ({"n_heads": 4, "windw": 3}, "windw"),
    ],
)
def test_wrong_fields_are_refused(fields, sentence):
    with pytest.raises(ValidationError, match=sentence):
        AttentionConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"n_heads": 5, "positions": "none"}, "5 heads do not divide d_model = 24 evenly: n_heads = 4 or 6 would"),
        ({"n_heads": 24}, "24 heads do not divide d_model = 24 into heads of even width.* n_heads = 12 would"),
        ({"n_heads": 10, "n_kv_heads": 2}, "10 heads do not divide .* n_heads = 6 or 12 would"),
        ({"n_heads": 5, "n_kv_heads": 5}, "5 heads do not divide .*: set head_dim"),
    ],
)
def test_heads_that_do_not_divide_the_model_are_refused(fields, sentence):
    with pytest.raises(ContractError, match=sentence):
        AttentionConfig(**fields).build(24, layer_idx=0, n_layers=1)
