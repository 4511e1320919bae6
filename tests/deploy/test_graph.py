"""The exported graph computes the model's logits and states, for any batch and any segments."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmix import MIXERS, ModelConfig, build_model
from seqmix.mixers.state import to_dict

if not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
    pytest.skip("needs pip install 'seqmix[onnx]'", allow_module_level=True)

from seqmix.deploy.export import require_exportable
from seqmix.deploy.graph import build_graph
from seqmix.deploy.metadata import add_metadata
from seqmix.deploy.session import OnnxModel
from seqmix.deploy.states import layout_of

VOCABULARY = 11


def mixer(kind: str) -> dict:
    """An example of a mixer, with two heads."""
    cls = MIXERS.resolve(kind)
    heads = {"n_heads": 2} if "n_heads" in cls.model_fields else {}
    return {"kind": kind} | cls.example_fields() | heads


def model_of(*mixers: str, **options):
    """A small model with one layer of each mixer."""
    blocks = {
        f"b{n}": {
            "mixer": mixer(kind),
            "ffn": None,
            "norm": {"kind": "rmsnorm"},
        }
        for n, kind in enumerate(mixers)
    }
    config = {
        "d_model": 24,
        "n_layers": len(mixers),
        "vocab_size": VOCABULARY,
        "blocks": blocks,
        "pattern": list(blocks),
    }
    return build_model(ModelConfig.model_validate(config | {"norm": {"kind": "rmsnorm"}} | options), seed=0).eval()


def exported(model, **options) -> OnnxModel:
    require_exportable(model)
    layout = layout_of(model)
    graph = build_graph(model, layout, **options)
    add_metadata(graph, model, layout, name="test")
    return OnnxModel.from_bytes(graph.SerializeToString())


@torch.no_grad()
def require_equal_segments(graph: OnnxModel, model, batch: int, lengths: list[int]) -> None:
    """Logits after every segment, and the final states, are those of the model."""
    tokens = torch.randint(VOCABULARY, (batch, sum(lengths)), generator=torch.Generator().manual_seed(0))
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
    """A model of retention, attention and a delta rule, and its graph."""
    model = model_of("retention", "attention", "gated_delta_net")
    return exported(model), model


@settings(max_examples=20)
@given(batch=st.integers(1, 3), lengths=segments)
def test_a_graph_computes_the_logits_and_states_of_its_model(hybrid, batch, lengths):
    require_equal_segments(*hybrid, batch, lengths)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXERS.kinds())
def test_the_graph_of_every_mixer(kind):
    model = model_of(kind, kind)
    graph = exported(model)

    @settings(max_examples=20)
    @given(batch=st.integers(1, 3), lengths=segments)
    def test(batch, lengths):
        require_equal_segments(graph, model, batch, lengths)

    test()
