"""Decoding in compiled steps, static buffers and captured graphs matches eager steps."""

import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from recorded_operations import Watched
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.testing import assert_close

import seqmix.models.decoding as module
from seqmix import Paradigm, build_model, load_config
from seqmix.mixers.base.state import clone, to_dict
from seqmix.models import CompileError, Decoder, Sampling, compile_blocks, generate_tokens, prefill, stream_text
from seqmix.models.builder import build_meta
from seqmix.models.decoding import compiled_after
from seqmix.ops.runtime.kernel import KERNELS, reference

PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4])]
STEPS = torch.randint(0, 257, (8, 2), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def eager(model, state, steps=None):
    paradigms, logits = model.prefer(Paradigm.RECURRENT, Paradigm.CHUNKWISE), []
    for tokens in STEPS[:steps]:
        after = model(tokens[:, None], state, paradigm=paradigms, return_state=True)
        state = after.state
        logits.append(after.logits[:, 0])
    return torch.stack(logits)


def decoded(decoder):
    return torch.stack([decoder.step(tokens).clone() for tokens in STEPS])


def places(state):
    return [leaf.data_ptr() for leaf in to_dict(state).values()]


@pytest.mark.usefixtures("plainly_compiled")
def test_compiled_steps_match_model_with_one_graph(model_of):
    model = model_of("retention", "attention")
    _, state = prefill(model, PROMPTS, max_length=20)
    expected = eager(model, clone(state))
    decoder = Decoder(model, state, compiled=True)
    assert_close(decoded(decoder), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # other prompts, of other lengths
    _, state = prefill(model, [torch.arange(7), torch.arange(9)], max_length=20)
    assert_close(decoded(Decoder(model, clone(state), compiled=True)), eager(model, clone(state)))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("plainly_compiled")
def test_compiled_steps_update_state_in_place(model_of):
    model = model_of("retention", "gla", "delta_net")
    _, state = prefill(model, PROMPTS, max_length=20)
    expected, memories = eager(model, clone(state)), [layer.memory.data_ptr() for layer in state]
    decoder = Decoder(model, state, compiled=True)
    assert_close(decoded(decoder), expected)
    assert [layer.memory.data_ptr() for layer in decoder.state] == memories


@pytest.mark.slow
def test_compiled_step_allocates_no_second_state(model_of):
    model = model_of("retention")
    decoder = Decoder(model, model.init_state(2), compiled=True)
    _, (code,) = run_and_get_code(decoder.step, STEPS[0])
    shape = str(tuple(decoder.state[0].memory.shape))
    assert f"({shape}" in code
    assert f"empty_strided_cpu({shape}" not in code


@torch.no_grad()
@pytest.mark.usefixtures("plainly_compiled")
def test_blocks_compiled_by_decoder_do_not_write_callers_state(model_of):
    model = model_of("retention", "delta_net")
    compile_blocks(model)
    Decoder(model, model.init_state(2)).step(STEPS[0])
    _, state = prefill(model, PROMPTS)
    before = clone(state)
    eager(model, state, 2)
    assert_close(state, before, rtol=0, atol=0)


@pytest.mark.usefixtures("plainly_compiled")
def test_prefill_does_not_use_training_graphs(model_of):
    model = model_of("retention")
    compile_blocks(model)
    for length in (3, 5, 8):
        prefill(model, [torch.arange(length)], max_length=20)
    assert counters["stats"]["unique_graphs"] == 0


class Recorded(module.StaticStep):
    """The last one that was made."""

    def __init__(self, *args):
        super().__init__(*args)
        type(self).latest = self


class FakeGraph:
    """A CUDA graph by its rules: calls during the capture do not run, and a replay runs them in their buffers."""

    made = 0

    def __init__(self):
        type(self).made += 1

    def replay(self):
        Recorded.latest()


@contextmanager
def capturing(graph):
    held = Recorded.latest
    state, logits = clone(held.state), held.logits.clone()
    yield
    for place, leaf in zip(to_dict(held.state).values(), to_dict(state).values(), strict=True):
        place.copy_(leaf)
    held.logits.copy_(logits)


@pytest.fixture
def captured(monkeypatch):
    stream = type("FakeStream", (), {"wait_stream": lambda self, other: None})
    for name, fake in {
        "Stream": stream,
        "current_stream": stream,
        "stream": lambda _: nullcontext(),
        "CUDAGraph": FakeGraph,
        "graph": capturing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(module, "StaticStep", Recorded)
    FakeGraph.made = 0

    def decoder_of(model, state):
        decoder = Decoder(model, state)
        decoder._may_capture = True
        return decoder

    return decoder_of


def test_captured_step_matches_model_with_static_buffers(model_of, each_mixer, captured):
    model = model_of(*each_mixer)
    _, state = prefill(model, PROMPTS, max_length=20)
    expected = eager(model, clone(state))
    decoder = captured(model, state)
    logits = [decoder.step(tokens).clone() for tokens in STEPS[:2]]
    held = decoder._captured.step
    before = places(held.state)
    logits += [decoder.step(tokens).clone() for tokens in STEPS[2:]]
    assert_close(torch.stack(logits), expected)
    assert places(held.state) == before
    assert held.tokens.data_ptr() != STEPS[1].data_ptr()
    assert FakeGraph.made == 1


def test_capture_copies_only_state_that_shares_memory(model_of):
    model = model_of("retention", "gla")
    _, state = prefill(model, PROMPTS, max_length=20)
    assert places(module.StaticStep(module.decode_step, STEPS[0], state).state) == places(state)
    ring = torch.zeros(4)
    held = module.StaticStep(module.decode_step, STEPS[0], ((ring, ring), (ring[::2], torch.zeros(1).expand(3))))
    assert len(set(places(held.state))) == 4
    assert all(leaf.is_contiguous() for leaf in to_dict(held.state).values())


@pytest.mark.parametrize("steps", [1, 2, 3, len(STEPS)])
def test_capture_works_when_the_cache_has_room_only_for_the_steps(model_of, captured, steps):
    model = model_of("attention", "hyena", "retention")
    _, state = prefill(model, PROMPTS, max_length=3 + steps)  # full after the steps, of the longer prompt
    expected = eager(model, clone(state), steps)
    decoder = captured(model, state)
    assert_close(torch.stack([decoder.step(tokens).clone() for tokens in STEPS[:steps]]), expected)
    assert FakeGraph.made == (steps > 1)


def test_only_captured_steps_may_write_state_in_place(model_of, captured, monkeypatch):
    allowed = []

    kernel = reference("decay", Paradigm.RECURRENT)

    def in_place(x):
        output, state = kernel.function(x)
        allowed.append(x.donated)
        return output, x.initial_state.copy_(state) if x.donated else state

    monkeypatch.setitem(KERNELS, kernel.key, replace(kernel, function=in_place))
    model = model_of("retention", "gla")
    _, state = prefill(model, PROMPTS, max_length=20)
    expected = eager(model, clone(state))
    assert not any(allowed)
    allowed.clear()
    assert_close(decoded(captured(model, state)), expected)
    assert all(allowed)


@pytest.mark.parametrize(("mixer", "operations"), [("retention", 54), ("attention", 73)])
def test_position_dependent_values_are_computed_once_per_step(model_of, mixer, operations):
    def seen(layers):
        model = model_of(mixer, n_layers=layers)
        _, state = prefill(model, PROMPTS, max_length=9)
        with Watched() as watched:
            Decoder(model, state).step(STEPS[0])
        return Counter(str(op).partition(".")[2].partition(".")[0] for op, results in watched.seen if results)

    more = seen(3) - seen(2)
    assert more == seen(2) - seen(1)
    assert more.total() <= operations, more
    assert not more.keys() & {"linspace", "exp2", "pow", "cos", "sin", "expm1", "log1p", "complex"}
    assert seen(1)["cos"]


def test_constants_are_computed_once_for_all_steps(model_of):
    model = model_of("retention")
    _, state = prefill(model, PROMPTS, max_length=9)
    decoder, formed, of_positions = Decoder(model, state), [], {"aten.cos.default"}
    for tokens in STEPS[:3]:
        with Watched() as watched:
            decoder.step(tokens)
        formed.append({"aten.pow.Scalar", "aten.exp2.default", *of_positions} & {str(op) for op, _ in watched.seen})
    assert formed == [{"aten.pow.Scalar", "aten.exp2.default", *of_positions}, of_positions, of_positions]


@pytest.mark.parametrize(("mixer", "part"), [("hyena", "filters"), ("h3", "diagonal"), ("lightning", "log_decay")])
def test_values_derived_from_parameters_are_computed_once_per_decoder(model_of, monkeypatch, mixer, part):
    model, formed = model_of(mixer, n_layers=2), []
    kind = type(model.blocks[0].mixer)
    form = getattr(kind, part)
    _, state = prefill(model, PROMPTS, max_length=20)
    expected = eager(model, clone(state))
    monkeypatch.setattr(kind, part, lambda self, *args: formed.append(self) or form(self, *args))
    assert_close(decoded(Decoder(model, state)), expected)
    assert formed == [block.mixer for block in model.blocks]
    with torch.no_grad():  # others' calls follow the parameters
        for parameter in model.parameters():
            parameter.mul_(1.5)
    _, state = prefill(model, PROMPTS, max_length=20)
    assert_close(decoded(Decoder(model, clone(state))), eager(model, state))


def test_decode_step_makes_limited_number_of_calls_per_layer(model_of):
    def calls(layers):
        model = model_of("retention", n_layers=layers)
        _, state = prefill(model, PROMPTS, max_length=9)
        decoder, found = Decoder(model, state), []
        for tokens in STEPS[:4]:  # what a garbage collector calls is not in all of them
            seen = Counter()
            sys.setprofile(lambda frame, event, arg, seen=seen: seen.update([event]))
            decoder.step(tokens)
            sys.setprofile(None)
            found.append(seen["call"] + seen["c_call"])
        return min(found)

    assert calls(4) - calls(2) <= 2 * 390


def test_growing_state_is_not_captured(model_of, captured):
    model = model_of("attention")
    _, state = prefill(model, PROMPTS)  # no max_length: caches grow
    expected = eager(model, clone(state))
    assert_close(decoded(captured(model, state)), expected)
    assert FakeGraph.made == 0


@pytest.fixture
def early(monkeypatch):
    """Compiling pays with six tokens left, once two have been decoded."""
    monkeypatch.setattr("seqmix.models.decoding.TOKENS_BEFORE_COMPILING", 2)
    monkeypatch.setattr("seqmix.models.decoding.COMPILE_SECONDS_PER_LAYER", 6.0)
    monkeypatch.setattr("seqmix.models.decoding.SAVED_SECONDS_PER_LAYER", 1.0)


@pytest.mark.parametrize(("tokens", "pays"), [(7, False), (8, True)])
@pytest.mark.usefixtures("plainly_compiled", "early")
def test_generation_compiles_after_first_tokens_only_if_worthwhile(model_of, tokens, pays):
    model = model_of("retention", "attention")
    greedy = Sampling(temperature=0)
    expected = torch.stack(
        list(generate_tokens(model, PROMPTS, max_new_tokens=tokens, sampling=greedy, compiled=False))
    )
    assert counters["stats"]["unique_graphs"] == 0
    found, graphs = [], []
    for token in generate_tokens(model, PROMPTS, max_new_tokens=tokens, sampling=greedy):
        found.append(token)
        graphs.append(counters["stats"]["unique_graphs"])
    assert_close(torch.stack(found), expected)
    assert graphs == [0, 0] + [pays] * (tokens - 2)


def test_larger_model_is_compiled_after_fewer_tokens_and_only_for_a_single_text():
    small, large = (
        build_model(load_config("retnet-tiny", ["model.n_layers=1", f"model.blocks.ret.ffn.expansion={factor}"]).model)
        for factor in (2, 64)
    )
    tokens = 30_000
    assert compiled_after(small, 1, tokens) is None
    assert compiled_after(large, 1, tokens) is not None
    assert compiled_after(large, 2, tokens) is None  # products of two rows are as fast in eager steps


def test_steps_are_compiled_by_default_only_on_cpu():
    assert compiled_after(build_meta(load_config("retnet-tiny").model), 1, 10**9) is None


@pytest.mark.usefixtures("plainly_compiled", "early")
def test_generation_with_stop_string_is_not_compiled(model_of):
    pieces = list(stream_text(model_of("retention"), ["ab"], max_new_tokens=8, stop=["\0" * 9]))
    assert pieces
    assert counters["stats"]["unique_graphs"] == 0


@pytest.fixture
def no_compiler(monkeypatch):
    """A compiler that fails, as inductor does where there is none for C++."""

    def fail(graph, inputs):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr("seqmix.models.decoding.rows_as_sums", fail)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("no_compiler", "early")
def test_generation_without_compiler_falls_back_to_eager_with_warning(model_of):
    model, greedy = model_of("retention", "attention"), Sampling(temperature=0)
    expected = list(generate_tokens(model, PROMPTS, max_new_tokens=8, sampling=greedy, compiled=False))
    with pytest.warns(UserWarning, match="no working C"):
        found = list(generate_tokens(model, PROMPTS, max_new_tokens=8, sampling=greedy))
    assert torch.equal(torch.stack(found), torch.stack(expected))
    with pytest.raises(CompileError, match="no working C"):
        list(generate_tokens(model, PROMPTS, max_new_tokens=8, sampling=greedy, compiled=True))
