"""Small models and their ONNX graphs."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmix import MIXERS, LanguageModel, ModelConfig, build_model
from seqmix.mixers.base.state import to_dict

NEEDED = ("onnx", "onnxscript", "onnxruntime")
VOCABULARY = 11


def mixer(kind: str, **options: Any) -> dict[str, Any]:
    """An example of a mixer, with two heads."""
    cls = MIXERS.resolve(kind)
    heads = {"n_heads": 2} if "n_heads" in cls.model_fields else {}
    return {"kind": kind} | cls.example_fields() | heads | options


def model_of(*mixers: str | dict[str, Any], ffn: Any = None, **options: Any) -> LanguageModel:
    """A small model with one layer of each mixer."""
    norm = {"kind": "rmsnorm"}
    chosen = [mixer(each) if isinstance(each, str) else mixer(**each) for each in mixers]
    blocks = {f"b{n}": {"mixer": each, "ffn": ffn, "norm": norm} for n, each in enumerate(chosen)}
    config = {"d_model": 24, "n_layers": len(mixers), "vocab_size": VOCABULARY, "blocks": blocks}
    config |= {"pattern": list(blocks), "norm": norm}
    return build_model(ModelConfig.model_validate(config | options), seed=0).eval()


def graph_of(model: LanguageModel, **options: Any) -> Any:
    """Export a model; return its graph, with metadata."""
    from seqmix.interop.onnx.export import require_exportable
    from seqmix.interop.onnx.graph import build_graph
    from seqmix.interop.onnx.metadata import add_metadata
    from seqmix.interop.onnx.states import layout_of

    require_exportable(model)
    layout = layout_of(model)
    graph = build_graph(model, layout, **options)
    add_metadata(graph, model, layout, name="test")
    return graph


def exported(model: LanguageModel, **options: Any) -> Any:
    """Export a model, and open its graph."""
    from seqmix.interop.onnx.session import OnnxModel

    return OnnxModel.from_bytes(graph_of(model, **options).SerializeToString())


segments = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def check_segments(graph: Any, model: LanguageModel) -> None:
    """Check that a graph computes the logits and the states of its model, for any batch and any segments."""

    @settings(max_examples=20)
    @given(batch=st.integers(1, 3), lengths=segments)
    @torch.no_grad()
    def check(batch: int, lengths: list[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(min(model.config.vocab_size, 256), (batch, sum(lengths)), generator=generator)
        before = model.init_state(batch)
        state = graph.init_state(batch)
        for part in tokens.split(lengths, dim=1):
            output = model(part, before, paradigm=model.prefer(from_state=True), return_state=True)
            before = output.state
            logits, state = graph(part.numpy(), state)
            torch.testing.assert_close(torch.from_numpy(logits), output.logits, rtol=1e-4, atol=1e-5)
        leaves = to_dict(before)
        for name, leaf in state.items():
            expected = leaves[name.removeprefix("state.")]
            torch.testing.assert_close(torch.from_numpy(leaf), expected, rtol=1e-4, atol=1e-4)

    check()
