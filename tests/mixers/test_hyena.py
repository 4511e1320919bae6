"""The Hyena layer against its formulas written out; and a mixer of a single paradigm, in the kit and in a model."""

import itertools
import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch._dynamo.testing
from pydantic import ValidationError
from torch.testing import assert_close

from seqmix import Paradigm, Sampling, build_model, generate_text, load_config
from seqmix.mixers import ContractError
from seqmix.mixers.hyena import AllocatedHyenaState, GrowingHyenaState, Hyena, HyenaConfig
from seqmix.mixers.state import concatenate
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


def exactly(actual, expected, tolerance=1e-9):
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


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
    config, weight = mixer.config, mixer.convolution.weight
    filters = [filter_at(mixer, t) for t in range(x.shape[1])]
    rows = []
    for row in x:
        inputs = [mixer.in_proj.weight @ token for token in row]
        streams = [
            mixer.convolution.bias
            + sum(weight[:, -1 - i] * inputs[t - i] for i in range(min(t + 1, config.short_conv)))
            for t in range(len(row))
        ]
        v, *gates = zip(*(stream.split(D_MODEL) for stream in streams), strict=True)
        n = 0
        for order, gate in enumerate(gates):
            if order or config.first_filter:
                v = [sum(filters[t - i][n] * v[i] for i in range(t + 1)) for t in range(len(v))]
                n += 1
            v = [a * b for a, b in zip(gate, v, strict=True)]
        rows.append(torch.stack(v) @ mixer.out_proj.weight.T)
    return torch.stack(rows)


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
def test_output_and_gradients_are_the_formulas(name):
    mixer = build(**OPTIONS[name])
    x = tokens(11).requires_grad_()  # longer than the filters are laid out for
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


@pytest.mark.parametrize("max_length", [None, 9])
def test_ragged_prompts_are_packed_and_decoded_as_a_batch(max_length):
    mixer, x, lengths = build(), tokens(9, batch_size=3), [4, 0, 6]
    prompt = torch.cat([x[n, :length] for n, length in enumerate(lengths)])[None]
    borders = torch.tensor([0, 4, 4, 10])
    with torch.no_grad():
        state = mixer.init_state(3, max_length=max_length)
        y, state = mixer(prompt, state, cu_seqlens=borders, return_state=True)
        rows = [y[0, a:b] for a, b in itertools.pairwise(borders)]
        for step in range(3):
            piece = torch.stack([x[n, length + step] for n, length in enumerate(lengths)])[:, None]
            y, state = mixer.step(piece, state)
            rows = [torch.cat((row, new)) for row, new in zip(rows, y, strict=True)]
    whole = written_out(mixer, x)
    for n, row in enumerate(rows):
        exactly(row, whole[n, : lengths[n] + 3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_state_is_as_declared(dtype):
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
    with pytest.raises(RuntimeError, match="allocated for fewer tokens"):
        mixer(tokens(3, dtype=dtype), after, return_state=True)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_more_tokens_than_there_is_room_for_are_answered_but_not_kept(paradigm):
    mixer, x = build(), tokens(9)
    with torch.no_grad():
        whole = written_out(mixer, x)
        exactly(mixer(x, mixer.init_state(2, max_length=4), paradigm=paradigm)[0], whole)
        _, state = mixer(x[:, :3], mixer.init_state(2, max_length=4), paradigm=paradigm, return_state=True)
        exactly(mixer(x[:, 3:], state, paradigm=paradigm)[0], whole[:, 3:])
    # and packed, each behind a state of its own
    packed, borders = x[:, 3:].reshape(1, 12, D_MODEL), torch.tensor([0, 6, 12])
    with torch.no_grad():
        y, _ = mixer(packed, state, paradigm=paradigm, cu_seqlens=borders)
    exactly(y.view(2, 6, D_MODEL), whole[:, 3:])


def test_states_of_different_lengths_are_not_concatenated():
    states = [build()(tokens(length), return_state=True)[1] for length in (3, 5)]
    with pytest.raises(ContractError, match=r"\(3, 2, 6\) and \(5, 2, 6\) a row: let states that grow read equally"):
        concatenate(states)


def test_filters_do_not_depend_on_how_many_are_asked_for():
    mixer = build()
    exactly(mixer.filters(5), mixer.filters(40)[..., :5], tolerance=1e-14)
    # far beyond, the window has closed to its shift
    open_window = build(decay_shift=1.0).filters(400)[..., -1]
    exactly(mixer.filters(400)[..., -1], 0.05 * open_window, tolerance=1e-4)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_lengths_compile_once(paradigm):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")  # the op's own test goes further
    mixer = build()
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend=counter)
    state, counts = mixer(tokens(3), return_state=True)[1], []
    for length in (5, 9, 4, 30):
        expected, _ = mixer(tokens(length), state, paradigm=paradigm, return_state=True)
        y, state = compiled(tokens(length), state, paradigm=paradigm, return_state=True)
        exactly(y, expected)
        counts.append(counter.frame_count)
    assert len({*counts}) == 1


def test_parameters_start_as_in_the_authors_code():
    mixer = HyenaConfig(sine_frequency=14.0).build(64, layer_idx=0, n_layers=1)
    for layer in (mixer.in_proj, mixer.out_proj, *mixer.filter_layers, mixer.filter_out):
        bound = layer.in_features**-0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound
    assert (mixer.frequency == 14).all()
    assert 0.8 < mixer.skip.std() < 1.2


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"order": 0}, "greater than 0"),
        ({"order": 1, "first_filter": False}, "order 1 has none: it needs an order of at least 2"),
        ({"filter_depth": 1}, "greater than or equal to 2"),
        ({"decay_range": (1.5, 0.3)}, r"1e-06 <= fastest <= slowest <= 1e\+06, and is \(1.5, 0.3\)"),
        ({"decay_range": (1e-320, 1.0)}, "decay_range needs 1e-06 <= fastest"),
        ({"decay_shift": 1e38}, "less than or equal to 10"),
        ({"sine_frequency": 1e39}, "less than or equal to 1000"),
        ({"filter_width": 10**12}, "less than or equal to 1048576"),
        ({"filter_length": 10**20}, "less than or equal to"),
        ({"filter_len": 3}, 'did you mean "filter_length"'),
    ],
)
def test_wrong_fields_are_refused(fields, sentence):
    with pytest.raises(ValidationError, match=sentence):
        HyenaConfig(**fields)


class ParallelAloneConfig(HyenaConfig):
    """Hyena without its recurrent paradigm: a mixer may declare a single one."""

    kind: Literal["parallel_alone"] = "parallel_alone"

    @property
    def traits(self):
        return replace(super().traits, paradigms=frozenset({Paradigm.PARALLEL}))


def test_a_mixer_of_one_paradigm_passes_the_kit():
    report = check_mixer(ParallelAloneConfig(**SMALL), examples=5, compiles=False)
    assert report.passed, report.failures[0].reason


def test_a_model_of_one_paradigm_trains_and_generates():
    config = load_config("hyena-tiny").model
    block = config.blocks["hyena"].model_copy(update={"mixer": ParallelAloneConfig(**SMALL)})
    model = build_model(config.model_copy(update={"d_model": 16, "n_layers": 2, "blocks": {"hyena": block}}))
    text = torch.tensor(list(b"to be or not to be"))[None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(text[:, :-1]).logits[0], text[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    model.eval()
    (alone,) = generate_text(model, ["to be "], max_new_tokens=8, sampling=Sampling(temperature=0))
    assert alone == "or not t"
    # prompts of several lengths are packed
    assert generate_text(model, ["to be ", "to be or "], max_new_tokens=3, sampling=Sampling(temperature=0)) == [
        "or ",
        "not",
    ]
