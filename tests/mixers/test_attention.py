"""The attention layer against its formulas written out, and its state."""

import math

import pytest
import torch
from formulas import assert_follows

from seqmix.mixers.attention import Attention, AttentionConfig
from seqmix.ops.softmax import GrowingCache, RingCache

D_MODEL = 24


def build(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    config = AttentionConfig(**{"n_heads": 4, "n_kv_heads": 2, "chunk_size": 3} | fields)
    return config.build(D_MODEL, layer_idx=0, n_layers=1).to(dtype)


def tokens(length, batch_size=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, length, D_MODEL, dtype=dtype, generator=generator)


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


@pytest.mark.parametrize("positions", ["rope", "xpos", "none"])
@pytest.mark.parametrize("fields", [{}, {"n_kv_heads": None}, {"n_kv_heads": 1}, {"head_dim": 10, "rope_base": 100.0}])
@pytest.mark.parametrize("window", [None, 4])
def test_output_and_gradients_are_the_formula(positions, fields, window):
    mixer = build(positions=positions, window=window, **fields)
    assert_follows(mixer, lambda mixer, x: (written_out(mixer, x),), tokens(11))


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
    if max_length == capacity:
        with pytest.raises(RuntimeError, match="max_length"):
            mixer(tokens(10, batch_size=3, dtype=torch.bfloat16), state, return_state=True)
