"""Small models and their ONNX graphs."""

from typing import Any

from seqmix import MIXERS, LanguageModel, ModelConfig, build_model

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


def exported(model: LanguageModel, **options: Any) -> Any:
    """Export a model, and open its graph."""
    from seqmix.deploy.export import require_exportable
    from seqmix.deploy.graph import build_graph
    from seqmix.deploy.metadata import add_metadata
    from seqmix.deploy.session import OnnxModel
    from seqmix.deploy.states import layout_of

    require_exportable(model)
    layout = layout_of(model)
    graph = build_graph(model, layout, **options)
    add_metadata(graph, model, layout, name="test")
    return OnnxModel.from_bytes(graph.SerializeToString())
