"""The Hyena layer against its written-out formulas, and a mixer with a single paradigm in the kit."""

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch._dynamo.testing
from mixer_formulas import assert_follows, convolved, exactly

from seqmix import Paradigm
from seqmix.mixers.hyena import AllocatedHyenaState, GrowingHyenaState, Hyena, HyenaConfig
from seqmix.testing import check_mixer

PARADIGMS = [Paradigm.PARALLEL, Paradigm.RECURRENT]
D_MODEL = 6
SMALL = {"filter_length": 8, "n_bands": 3, "filter_width": 5, "filter_depth": 3, "sine_frequency": 2.0}


def build(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    return HyenaConfig(**SMALL | fields).build(D_MODEL, layer_idx=0, n_layers=1).to(dtype)


def tokens(length, batch_size=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, length, D_MODEL, dtype=torch.float64, generator=generator).to(dtype)


def filter_at(mixer: Hyena, t):
    """h_n(t), [N D], with b_n where t is 0."""
    config, s = mixer.config, t / mixer.config.filter_length
    turns = [2 * math.pi * k * s for k in range(1, config.n_bands + 1)]
    y = torch.tensor([s, *map(math.cos, turns), *(-math.sin(turn) for turn in turns)], dtype=torch.float64)
    for layer in mixer.filter_layers:
        y = torch.sin(mixer.frequency * (layer.weight @ y + layer.bias))
    y = (mixer.filter_out.weight @ y).view(-1, D_MODEL)
    fast, slow = config.decay_range
    rates = [1 / slow + d / (D_MODEL - 1) * (1 / fast - 1 / slow) for d in range(D_MODEL)]
    window = torch.tensor([0.01 ** (rate * s) + config.decay_shift for rate in rates], dtype=torch.float64)
    return y * window + (mixer.skip if t == 0 else 0)


def written_out(mixer: Hyena, x):
    """The layer from position 0: every convolution as a sum over pairs of tokens."""
    config, length = mixer.config, x.shape[1]
    filters = [filter_at(mixer, t) for t in range(length)]
    streams = mixer.convolution.bias + convolved(x @ mixer.in_proj.weight.T, mixer.convolution.weight)
    v, *gates = streams.chunk(config.order + 1, dim=-1)
    n = 0
    for order, gate in enumerate(gates):
        if order or config.first_filter:
            v = torch.stack([sum(filters[t - i][n] * v[:, i] for i in range(t + 1)) for t in range(length)], 1)
            n += 1
        v = gate * v
    return v @ mixer.out_proj.weight.T


OPTIONS = {
    "defaults": {},
    "order 1": {"order": 1},
    "order 3": {"order": 3},
    "as the authors' code": {"first_filter": False},
    "no short convolution": {"short_conv": 1},
    "one layer of sines": {"filter_depth": 2, "n_bands": 1},
    "window": {"decay_range": (0.1, 0.1), "decay_shift": 0.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_output_and_gradients_match_written_out_formulas(name):
    # longer than the filters are laid out for
    assert_follows(build(**OPTIONS[name]), lambda mixer, x: (written_out(mixer, x),), tokens(11))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_state_has_declared_type_shape_and_dtype(dtype):
    mixer = build(dtype, order=3, short_conv=4)
    wide = torch.promote_types(dtype, torch.float32)
    for max_length, kind, room in ((None, GrowingHyenaState, 0), (7, AllocatedHyenaState, 7)):
        state = mixer.init_state(2, max_length=max_length)
        assert type(state) is kind
        assert (state.recent.shape, state.recent.dtype) == ((2, 3, 4 * D_MODEL), dtype)
        assert (state.inputs.shape, state.inputs.dtype) == ((2, room, 3, D_MODEL), wide)
        _, after = mixer(tokens(5, dtype=dtype), state, return_state=True)
        assert after.inputs.shape[1] == (max_length or 5)
    assert after.length.tolist() == [5, 5]
    with pytest.raises(RuntimeError, match="max_length"):
        mixer(tokens(3, dtype=dtype), after, return_state=True)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_tokens_beyond_state_capacity_work_without_a_final_state(paradigm):
    mixer, x = build(), tokens(9)
    with torch.no_grad():
        whole = written_out(mixer, x)
        exactly(mixer(x, mixer.init_state(2, max_length=4), paradigm=paradigm)[0], whole)
        _, state = mixer(x[:, :3], mixer.init_state(2, max_length=4), paradigm=paradigm, return_state=True)
        exactly(mixer(x[:, 3:], state, paradigm=paradigm)[0], whole[:, 3:])
        # and packed, each document after its own state
        packed, boundaries = x[:, 3:].reshape(1, 12, D_MODEL), torch.tensor([0, 6, 12])
        y, _ = mixer(packed, state, paradigm=paradigm, cu_seqlens=boundaries)
        exactly(y.view(2, 6, D_MODEL), whole[:, 3:])


def test_different_lengths_compile_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")  # the op's own test has both paradigms
    mixer = build()
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend=counter)
    state, counts = mixer(tokens(3), return_state=True)[1], []
    for length in (5, 9, 4, 30):
        expected, _ = mixer(tokens(length), state, return_state=True)
        y, state = compiled(tokens(length), state, return_state=True)
        exactly(y, expected)
        counts.append(counter.frame_count)
    assert len({*counts}) == 1


class ParallelOnlyConfig(HyenaConfig):
    """Hyena without its recurrent paradigm: a mixer may declare a single one."""

    kind: Literal["parallel_only"] = "parallel_only"

    @property
    def traits(self):
        return replace(super().traits, paradigms=frozenset({Paradigm.PARALLEL}))


def test_parallel_only_mixer_passes_the_kit():
    report = check_mixer(ParallelOnlyConfig(**SMALL), examples=2, compiles=False)
    assert report.passed, report.failures[0].reason
