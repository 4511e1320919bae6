"""Latent attention against its paper's equations, its state, and the cost of decoding."""

import math

import pytest
import torch
from mixer_formulas import assert_follows, rms, turned

from seqmix.mixers import Paradigm
from seqmix.mixers.base.state import nbytes
from seqmix.mixers.latent_attention import LatentAttention, LatentAttentionConfig
from seqmix.ops.attention import GrowingCache, RingCache
from seqmix.registry import SeqmixError
from seqmix.testing.counting import count_flops

D_MODEL = 24
SIZES = {"kv_lora_rank": 5, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 3}


def build(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    config = LatentAttentionConfig(**{"n_heads": 3, "chunk_size": 3} | fields)
    mixer = config.build(D_MODEL, layer_idx=0, n_layers=1)
    for norm in (mixer.q_norm, mixer.kv_norm):  # weights of 1 would hide that they are there
        if norm is not None:
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return mixer.to(dtype)


def tokens(length, batch_size=2, dtype=torch.float64):
    return torch.randn(batch_size, length, D_MODEL, generator=torch.Generator().manual_seed(1)).to(dtype)


def written_out(mixer: LatentAttention, x):
    """The paper's equations, head by head; the rotation is of interleaved pairs."""
    config, length = mixer.config, x.shape[1]
    key, turning, value = mixer.key_dim, mixer.rotary_dim, mixer.value_dim
    a, latent, rotary = x.matmul(mixer.in_proj.weight.T).split([*mixer.widths.values()], -1)
    if config.q_lora_rank is not None:
        a = rms(a, config.norm_eps) * mixer.q_norm.weight @ mixer.q_up.weight.T
    c = rms(latent, config.norm_eps) * mixer.kv_norm.weight
    turn = config.positions == "rope"
    r = turned(rotary[:, :, None], "rope", config.rope_base)[:, :, 0] if turn else rotary
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (config.window or length))
    outputs = []
    for h in range(config.n_heads):
        q = a[..., h * (key + turning) : (h + 1) * (key + turning)]
        q_turned = turned(q[:, :, None, key:], "rope", config.rope_base)[:, :, 0] if turn else q[..., key:]
        up = mixer.kv_up.weight[h * (key + value) : (h + 1) * (key + value)]
        scores = (q[..., :key] @ (c @ up[:key].T).mT + q_turned @ r.mT) / math.sqrt(key + turning)
        outputs.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ (c @ up[key:].T))
    return torch.cat(outputs, -1) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    "fields",
    [{}, SIZES, SIZES | {"q_lora_rank": 4, "norm_eps": 0.1}, {"n_heads": 1, "rope_base": 100.0}, {"positions": "none"}],
)
def test_output_and_gradients_match_the_paper_in_every_paradigm(fields, window):
    mixer = build(window=window, **fields)
    assert_follows(mixer, lambda mixer, x: (written_out(mixer, x),), tokens(11))


@pytest.mark.parametrize(
    ("window", "max_length", "kind", "capacity"),
    [(None, None, GrowingCache, 0), (None, 9, RingCache, 9), (5, 9, RingCache, 5)],
)
def test_state_holds_one_latent_and_one_rotary_key_per_token(window, max_length, kind, capacity):
    mixer = build(window=window, dtype=torch.bfloat16, **SIZES)
    state = mixer.init_state(3, max_length=max_length)
    assert type(state) is kind
    assert state.keys.shape == (3, capacity, 1, 5 + 4)
    assert state.keys.dtype == torch.bfloat16
    for paradigm in Paradigm:
        _, after = mixer(tokens(7, 3, torch.bfloat16), paradigm=paradigm, return_state=True)
        assert after.keys.shape == (3, 7 if window is None else 5, 1, 5 + 4)
        assert nbytes(after) == after.keys.numel() * 2 + 3 * 8  # and the length


def test_default_widths_follow_the_paper():
    mixer = build(n_heads=2)
    assert (mixer.key_dim, mixer.value_dim, mixer.rotary_dim, mixer.rank) == (12, 12, 6, 48)
    with pytest.raises(SeqmixError, match="4 or 6"):
        build(n_heads=5)
    assert build(n_heads=5, qk_nope_head_dim=3).key_dim == 3


def test_decoding_step_does_not_expand_cached_latents_to_keys():
    mixer = build(**SIZES)

    def step(paradigm, context):
        state = mixer.init_state(1, max_length=context + 1)._replace(length=torch.tensor([context]))
        with torch.no_grad():
            return count_flops(lambda: mixer(tokens(1, 1), state, paradigm=paradigm, return_state=True))

    heads, rank, turning = 3, 5, 4
    per_token = (step(Paradigm.RECURRENT, 200) - step(Paradigm.RECURRENT, 100)) / 100
    assert per_token == 2 * heads * (rank + turning + rank)
    assert step(Paradigm.PARALLEL, 200) - step(Paradigm.PARALLEL, 100) > 200 * mixer.kv_up.weight.numel()


def test_decoding_step_does_not_copy_latents_per_head():
    mixer = build(dtype=torch.float32, n_heads=3, kv_lora_rank=64)
    state, x = mixer.init_state(1, max_length=4096), tokens(1, 1, torch.float32)
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.untyped_storage().nbytes())
            return result

    with torch.no_grad(), Watch():
        mixer.step(x, state)
    assert max(sizes) <= state.keys.untyped_storage().nbytes()
