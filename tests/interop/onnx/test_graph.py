"""The exported graph computes the model's logits and states, for every mixer, option and preset."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from nightly import NIGHTLY
from onnx_models import NEEDED, VOCABULARY, check_segments, exported, graph_of, model_of
from small_runs import refusal

from seqmix import MIXERS, build_model, load_config
from seqmix.mixers.base.influence import weights_of
from seqmix.mixers.base.layer_call import PLAIN_CALL
from seqmix.training import PRESETS

if not all(map(find_spec, NEEDED)):
    pytest.skip("needs pip install 'seqmix[onnx]'", allow_module_level=True)

from seqmix.interop.onnx.export import UNTRANSLATED, require_exportable
from seqmix.interop.onnx.session import OnnxModel
from seqmix.interop.onnx.states import layout_of

PAGE = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "onnx.md"
OPERATORS = {"LinearAttention", "Scan", "Conv", "Softmax"}
"""Operators that combine tokens."""
OPTIONS = [
    {"kind": "attention", "window": 5, "n_kv_heads": 1},
    {"kind": "attention", "window": 4, "sinks": True, "softcap": 3.0},
    {"kind": "attention", "window": 6, "forget_gate": True, "positions": "none"},
    {"kind": "attention", "positions": "alibi", "forget_gate": True},
    {"kind": "attention", "positions": "xpos", "gate": "sigmoid"},
    {"kind": "retention", "learnable_decay": True, "rotation": "rope"},
    {"kind": "delta_product", "n_steps": 3},
    {"kind": "gated_delta_net", "precondition": 1.5},
]
SAMPLED = [*OPTIONS[:4], *(pytest.param(options, marks=NIGHTLY) for options in OPTIONS[4:])]
SAMPLE = ("attention", "gated_delta_net", "hyena", "latent_attention", "mamba", "mlstm", "retention", "rwkv7")
"""Mixers of which every run exports the graph: one for each way in which ops are translated."""
MODELS = {file.stem: load_config(file.stem).model for file in sorted(PRESETS.glob("*.yaml"))}
SMALL_PRESETS = [
    name
    for name, model in MODELS.items()
    if model.d_model <= 512 and (len({*model.layers}) > 1 or model.residual.kind != "plain")
]
"""Presets of which one layer of each kind is exported in seconds; those left out are models of one mixer."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in SAMPLE else NIGHTLY)
        for kind in MIXERS.kinds()
        if kind not in UNTRANSLATED
    ],
)
def test_exported_graph_matches_every_mixer(kind):
    layers = 2 if kind == "rwkv7" else 1  # its second layer mixes in values of the first
    model = model_of(*[kind] * layers)
    graph = graph_of(model)
    check_segments(OnnxModel.from_bytes(graph.SerializeToString()), model)
    (row,) = re.findall(rf"^\| `{kind}` \|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    assert {node.op_type for node in graph.graph.node} & OPERATORS == set(re.findall(r"`(\w+)`", row))


@pytest.mark.parametrize("kind", UNTRANSLATED)
def test_mixers_without_a_translation_are_rejected(kind):
    expected = f"{kind} cannot be exported to ONNX: {UNTRANSLATED[kind]}"
    assert expected in refusal(lambda: require_exportable(model_of(kind)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    SAMPLED,
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_exported_graph_matches_mixer_options(options):
    model = model_of(options)
    check_segments(exported(model), model)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 4])
def test_exported_graph_matches_model_with_shared_keys_and_values(window):
    attention = {"kind": "attention", "n_heads": 2, "window": window, "differential": True}
    block = {"mixer": attention, "ffn": None, "norm": {"kind": "rmsnorm"}}
    shared = {"blocks": {"b": block}, "pattern": ["b"], "kv_sharing": {"kind": "last", "layers": 1}}
    model = model_of("attention", "attention", **shared)
    assert not any(name.startswith("1.keys") for name in layout_of(model).leaves)
    check_segments(exported(model), model)


@pytest.mark.slow
def test_exported_graph_matches_canon_layers():
    block = {"mixer": {"kind": "attention", "n_heads": 2}, "norm": {"kind": "rmsnorm"}, "canon": ["a", "c", "d"]}
    block |= {"ffn": {"kind": "swiglu", "expansion": 1.0}}
    model = model_of("attention", blocks={"b": block}, pattern=["b"])
    check_segments(exported(model), model)


@pytest.mark.slow
@NIGHTLY
@pytest.mark.parametrize("preset", SMALL_PRESETS)
def test_exported_graph_matches_every_preset(preset):
    config = MODELS[preset]
    layers = min(len(config.pattern or "b"), config.n_layers)
    model = build_model(config.model_copy(update={"n_layers": layers}), seed=0).eval()
    check_segments(exported(model), model)


@pytest.mark.slow
def test_exported_graph_matches_with_opset_27():
    model = model_of("gla", "gated_delta_net")
    graph = graph_of(model, opset="27")
    assert {entry.domain: entry.version for entry in graph.opset_import} == {"": 27}
    check_segments(OnnxModel.from_bytes(graph.SerializeToString()), model)


@pytest.mark.slow
def test_views_contain_decays_write_strengths_and_attention_weights():
    model = model_of("retention", "attention", "gated_delta_net")
    graph = exported(model, views=True)
    check_segments(graph, model)
    tokens = torch.arange(8)[None] % VOCABULARY
    _, state = graph(tokens[:, :3].numpy(), graph.init_state(1))
    views = graph.view(tokens[:, 3:].numpy(), state)
    assert {view["name"]: view["axes"][1] for view in graph.metadata["views"]} == {
        "view.0.decay": "length",
        "view.1.attention": "heads",
        "view.2.decay": "length",
        "view.2.write": "length",
    }
    _, log_decay = model.blocks[0].mixer.decay.log_decays("cpu", torch.float32)
    torch.testing.assert_close(torch.from_numpy(views["view.0.decay"]), log_decay.exp().expand(1, 5, -1))
    assert ((views["view.2.write"] > 0) & (views["view.2.write"] < 1)).all()
    calls = []
    model.blocks[1].mixer.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    with torch.no_grad():
        model(tokens)
    weights, _ = weights_of(model.blocks[1].mixer, calls[0], range(3, 8), PLAIN_CALL)
    torch.testing.assert_close(torch.from_numpy(views["view.1.attention"]), weights, rtol=1e-4, atol=1e-5)


def test_initial_states_are_stored_as_scalars_or_rows():
    leaves = layout_of(model_of("rwkv4")).leaves
    assert leaves["0.recent"].initial.shape == ()
    mean, weight = leaves["0.memory"].initial  # averages, and logarithms of weights
    assert (mean == 0).all()
    assert weight.isneginf().all()


def test_initial_states_that_differ_across_the_batch_are_rejected(monkeypatch):
    model = model_of("min_gru")
    mixer = model.blocks[0].mixer
    start = mixer.init_state(2)
    other = start._replace(memory=torch.arange(start.memory.numel()).view_as(start.memory).float())
    monkeypatch.setattr(mixer, "init_state", lambda *_, **__: other)
    assert "min_gru cannot be exported to ONNX" in refusal(lambda: layout_of(model))


@pytest.mark.slow
def test_exported_graph_matches_with_extreme_gates():
    # the logarithm of a sigmoid of -200 is -200, not the logarithm of 0
    model = model_of("gla")
    with torch.no_grad():
        for name, parameter in model.blocks[0].mixer.named_parameters():
            if "decay_proj" in name:
                parameter.mul_(100)
    check_segments(exported(model), model)


@pytest.mark.slow
def test_untraceable_mixer_is_rejected_by_name(monkeypatch):
    model = model_of("min_gru")
    mixer = model.blocks[0].mixer
    mix = mixer.mix
    monkeypatch.setattr(mixer, "mix", lambda x, call: mix(x if x.sum() > 0 else -x, call))
    assert "a model of min_gru cannot be exported to ONNX" in refusal(lambda: graph_of(model))
