"""Metadata of an exported ONNX file: how to start, to tokenize and to sample, as JSON.

    format         version of this metadata, 1
    seqmix         version of seqmix that wrote the file
    name           name of the run
    weights        float32, int8 or int4
    config         the model's configuration
    tokenizer      "bytes", the content of a tokenizer.json, or null if the tokens are not text
    vocabulary     number of logits
    text_tokens    number of tokens that may be sampled, those below it; null without a tokenizer
    begin_token    token that opens a text; null without a tokenizer
    states         for each tensor of the state its name as an input, layer, mixer, dtype, shape, and initial value
    views          likewise for each view, with the names of its axes

In shapes, "batch" is the number of rows, and "past" the number of tokens read so far, 0 at the start. An initial value
is a number for all elements, or nested lists with those of one row. Minus infinity is the string "-Infinity", because
JSON has no number for it. The output of a state is its name after `new_`.
"""

import json
import math
from typing import Any

from .. import __version__
from ..models import LanguageModel
from .states import StateLayout
from .views import AXES

METADATA_KEY = "seqmix"
"""Key of the metadata in an exported file."""
FORMAT = 1
"""Version of the metadata."""


def add_metadata(
    graph: Any, model: LanguageModel, layout: StateLayout, *, name: str, weights: str | None = None
) -> None:
    """Write the metadata of a model's graph into it.

    Args:
        graph: the graph, a `ModelProto`.
        model: the model.
        layout: the layout of the model's state.
        name: name of the run.
        weights: format of quantised weights; None for float32.
    """
    entry = graph.metadata_props.add()
    entry.key = METADATA_KEY
    entry.value = json.dumps(_describe(graph, model, layout, name, weights))


def _describe(graph: Any, model: LanguageModel, layout: StateLayout, name: str, weights: str | None) -> dict[str, Any]:
    tokenizer = model.tokenizer
    content = None
    if tokenizer is not None:
        content = "bytes" if tokenizer.vocabulary is None else json.loads(tokenizer.vocabulary)
    return {
        "format": FORMAT,
        "seqmix": __version__,
        "name": name,
        "weights": weights or "float32",
        "config": model.config.model_dump(mode="json"),
        "tokenizer": content,
        "vocabulary": model.config.vocab_size,
        "text_tokens": None if tokenizer is None else tokenizer.text_tokens,
        "begin_token": None if tokenizer is None else tokenizer.begin,
        "states": [
            {
                "name": leaf.name,
                "layer": leaf.layer,
                "mixer": model.blocks[leaf.layer].mixer.kind,
                "dtype": str(leaf.dtype).removeprefix("torch."),
                "shape": list(leaf.shape),
                "initial": _numbers(leaf.initial.tolist()),
            }
            for leaf in layout.leaves.values()
        ],
        "views": [_describe_view(value, model) for value in graph.graph.output if value.name.startswith("view.")],
    }


def _numbers(value: Any) -> Any:
    """Return numbers, or nested lists of numbers, as JSON has them."""
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return value if math.isfinite(value) else f"{value}".replace("inf", "Infinity")


def _describe_view(value: Any, model: LanguageModel) -> dict[str, Any]:
    """Return the entry of an output, which is a view."""
    _, layer, kind = value.name.split(".")
    return {
        "name": value.name,
        "layer": int(layer),
        "mixer": model.blocks[int(layer)].mixer.kind,
        "kind": kind,
        "shape": [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        "axes": AXES[kind],
    }
