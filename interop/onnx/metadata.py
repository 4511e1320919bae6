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

A file ends with a second entry of metadata, the SHA-256 of all bytes before it.
"""

import hashlib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ... import __version__
from ...models import LanguageModel
from .states import StateLayout
from .views import AXES

METADATA_KEY = "seqmix"
"""Key of the metadata in an exported file."""
FORMAT = 1
"""Version of the metadata."""
CHECKSUM_KEY = b"seqmix.sha256"
_ENTRY = b"\x0a" + bytes([len(CHECKSUM_KEY)]) + CHECKSUM_KEY + b"\x12\x40"
_CHECKSUM = b"\x72" + bytes([len(_ENTRY) + 64]) + _ENTRY
"""Beginning of a metadata entry in protobuf: `metadata_props`, its key, and a value of the 64 digits that follow.

Protobuf joins messages by concatenation, so an entry can be appended to a file, and read without the package onnx.
"""


class _Part(BaseModel):
    """Part of the metadata: the fields that `OnnxModel` reads; others may have any value."""

    model_config = ConfigDict(strict=True)


class StateEntry(_Part):
    """Tensor of the state."""

    name: str
    dtype: Literal["float64", "float32", "float16", "int64", "int32", "bool"]
    shape: list[Annotated[int, Field(ge=0)] | Literal["batch", "past"]]
    initial: float | str | list[Any]


class ViewEntry(_Part):
    """Output that shows the model at work."""

    name: str


class Metadata(_Part):
    """Schema of the metadata in a file, which may be from somebody else."""

    format: int
    tokenizer: Literal["bytes"] | dict[str, Any] | None
    vocabulary: int
    begin_token: int | None
    states: list[StateEntry]
    views: list[ViewEntry]


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


def seal(content: bytes) -> bytes:
    """Return the content of a file with its checksum at the end."""
    return content + _CHECKSUM + hashlib.sha256(content).hexdigest().encode()


def is_intact(content: bytes) -> bool:
    """Return False if the content of a file differs from the checksum at its end; files of older versions have none."""
    content, checksum = content[:-64], content[-64:]
    if not content.endswith(_CHECKSUM):
        return True
    return hashlib.sha256(content.removesuffix(_CHECKSUM)).hexdigest().encode() == checksum


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
