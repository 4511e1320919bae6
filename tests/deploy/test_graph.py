"""The exported graph computes the model's logits and states, for any batch and any segments."""

from importlib.util import find_spec

import pytest
import torch
from deployed import NEEDED, VOCABULARY, exported, model_of
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmix import MIXERS, build_model, load_config
from seqmix.mixers.influence import weights_of
from seqmix.mixers.state import to_dict
from seqmix.training import PRESETS

if not all(map(find_spec, NEEDED)):
    pytest.skip("needs pip install 'seqmix[onnx]'", allow_module_level=True)

from seqmix.deploy.session import OnnxModel


@torch.no_grad()
def require_equal_segments(graph: OnnxModel, model, batch: int, lengths: list[int]) -> None:
    """Logits after every segment, and the final states, are those of the model."""
    tokens = torch.randint(
        min(model.config.vocab_size, 256), (batch, sum(lengths)), generator=torch.Generator().manual_seed(0)
    )
    before = model.init_state(batch)
    state = graph.init_state(batch)
    for part in tokens.split(lengths, dim=1):
        output = model(part, before, paradigm=model.prefer(from_state=True), return_state=True)
        before = output.state
        logits, state = graph(part.numpy(), state)
        torch.testing.assert_close(torch.from_numpy(logits), output.logits, rtol=1e-4, atol=1e-5)
    leaves = to_dict(before)
    for name, leaf in state.items():
        torch.testing.assert_close(torch.from_numpy(leaf), leaves[name.removeprefix("state.")], rtol=1e-4, atol=1e-4)


segments = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def hybrid():
    """A graph with views, and its model: retention, attention and a delta rule."""
    model = model_of("retention", "attention", "gated_delta_net")
    return exported(model, views=True), model


@settings(max_examples=20)
@given(batch=st.integers(1, 3), lengths=segments)
def test_a_graph_computes_the_logits_and_states_of_its_model(hybrid, batch, lengths):
    require_equal_segments(*hybrid, batch, lengths)


def test_views_are_decays_write_strengths_and_attention_weights(hybrid):
    graph, model = hybrid
    tokens = torch.arange(8)[None] % VOCABULARY
    _, state = graph(tokens[:, :3].numpy(), graph.init_state(1))
    views = graph.view(tokens[:, 3:].numpy(), state)
    described = {view["name"]: view for view in graph.metadata["views"]}
    assert {name: view["axes"][1] for name, view in described.items()} == {
        "view.0.decay": "length",
        "view.1.attention": "heads",
        "view.2.decay": "length",
        "view.2.write": "length",
    }
    gamma = model.blocks[0].mixer.decay.log_decays("cpu", torch.float32, None)[1].exp()
    torch.testing.assert_close(torch.from_numpy(views["view.0.decay"]), gamma.expand(1, 5, -1))
    assert ((views["view.2.write"] > 0) & (views["view.2.write"] < 1)).all()
    calls = []
    model.blocks[1].mixer.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    with torch.no_grad():
        model(tokens)
    weights, _ = weights_of(model.blocks[1].mixer, calls[0], range(3, 8))
    torch.testing.assert_close(torch.from_numpy(views["view.1.attention"]), weights, rtol=1e-4, atol=1e-5)


def check(model, **options):
    """Segments of a model by its graph."""
    graph = exported(model, **options)

    @settings(max_examples=20)
    @given(batch=st.integers(1, 3), lengths=segments)
    def test(batch, lengths):
        require_equal_segments(graph, model, batch, lengths)

    test()


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXERS.kinds())
def test_the_graph_of_every_mixer(kind):
    layers = 2 if kind == "rwkv7" else 1  # its second layer mixes in values of the first
    check(model_of(*[kind] * layers))


SMALL_PRESETS = [file.stem for file in sorted(PRESETS.glob("*.yaml")) if load_config(file.stem).model.d_model <= 512]

MIXER_OPTIONS = [
    {"kind": "attention", "window": 5, "n_kv_heads": 1},
    {"kind": "attention", "window": 4, "sinks": True, "softcap": 3.0},
    {"kind": "attention", "window": 6, "forget_gate": True, "positions": "none"},
    {"kind": "attention", "positions": "alibi", "forget_gate": True},
    {"kind": "attention", "positions": "xpos", "gate": "sigmoid"},
    {"kind": "retention", "learnable_decay": True, "rotation": "rope"},
    {"kind": "delta_product", "n_steps": 3},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", MIXER_OPTIONS, ids=lambda options: " ".join(map(str, options.values())))
def test_the_graph_of_options(options):
    check(model_of(options))


@pytest.mark.slow
def test_a_graph_with_the_standards_own_operator():
    check(model_of("gla", "gated_delta_net"), opset="27")


@pytest.mark.slow
@pytest.mark.parametrize("preset", SMALL_PRESETS)
def test_the_graph_of_every_preset(preset):
    config = load_config(preset).model
    layers = len(config.pattern or "b")
    check(build_model(config.model_copy(update={"n_layers": min(layers, config.n_layers)}), seed=0).eval())
