"""One ONNX graph of a model: (tokens, state) -> (logits, state), for any batch size and any length of a segment."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor, nn

from ...mixers.base.state import to_dict
from ...models import LanguageModel
from ...registry import SeqmixError
from .loops import inline_loops
from .lowering import CONTRIB, Lowering
from .silence import silenced
from .states import StateLayout, recurrent_paradigms
from .views import View, recorded_views

BASE_OPSET = 21
"""Version of the standard operators, apart from LinearAttention; browsers and older runtimes have it."""
STANDARD_OPSET = 27
"""Version of the standard that brings LinearAttention."""


class _Step(nn.Module):
    """A model whose state is a list of tensors."""

    def __init__(
        self, model: LanguageModel, layout: StateLayout, add_views: Callable[[list[View]], object] | None
    ) -> None:
        """Wrap a model; its views are further outputs, and passed to `add_views`, if that is not None."""
        super().__init__()
        self.model = model
        self.layout = layout
        self.add_views = add_views

    def forward(self, tokens: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = self.layout.leaves
        growing = [x for x, leaf in zip(tensors, leaves.values(), strict=True) if "past" in leaf.shape]
        past = growing[0].shape[1] if growing else 0
        state = self.layout.build(dict(zip(leaves, tensors, strict=True)), tokens.shape[0], past)
        paradigms = recurrent_paradigms(self.model)
        recorder = nullcontext([]) if self.add_views is None else recorded_views(self.model, tokens)
        with Lowering(), recorder as views:
            output = self.model(tokens, state, paradigm=paradigms, return_state=True)
        if self.add_views is not None:
            self.add_views(views)
        after = to_dict(output.state)
        return output.logits, *(after[name] for name in leaves), *(view.value for view in views)


def build_graph(
    model: LanguageModel, layout: StateLayout, *, opset: str = "contrib", views: bool = False
) -> ModelProto:
    """Return the graph of a model in evaluation mode.

    Its inputs are `tokens` [batch length] and the leaves of the state, its outputs `logits`, the leaves afterwards, and
    the views.

    Args:
        model: the model, on a CPU, with float32 parameters.
        layout: the layout of its state.
        opset: where LinearAttention comes from, "contrib" or "27".
        views: True to add views as outputs.

    Raises:
        SeqmixError: a layer cannot be exported.
    """
    try:
        with torch.no_grad(), _reference_kernels(model), silenced():
            translated = _translate(model, layout, views)
    except SeqmixError:
        raise
    except Exception as error:  # whatever torch's exporter raises for a layer that it cannot trace
        kinds = ", ".join(sorted({block.mixer.kind for block in model.blocks}))
        reason = next(iter(str(error).splitlines()), "")
        raise SeqmixError(f"a model of {kinds} cannot be exported to ONNX: {type(error).__name__}: {reason}") from error
    graph = inline_loops(translated)
    _name_dimensions(graph, layout)
    _remove_traces(graph)
    if opset != "contrib":
        _use_standard(graph)
    return graph


def _translate(model: LanguageModel, layout: StateLayout, views: bool) -> ModelProto:
    """Trace a model, and translate its operations; recurrences are still calls of the functions of `loops`."""
    leaves = layout.leaves.values()
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    tensors = [leaf for name, leaf in to_dict(layout.like).items() if name in layout.leaves]
    dims = {name: torch.export.Dim(name) for name in ("batch", "length", "past")}
    dynamic = [{axis: dims[size] for axis, size in enumerate(leaf.shape) if isinstance(size, str)} for leaf in leaves]
    found: list[View] = []
    program = torch.export.export(
        _Step(model, layout, found.extend if views else None),
        (tokens, tensors),
        dynamic_shapes=({0: dims["batch"], 1: dims["length"]}, dynamic),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    _require_lowered(program)
    states = [leaf.name for leaf in leaves]
    translated = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["tokens", *states],
        output_names=["logits", *(f"new_{name}" for name in states), *(view.name for view in found)],
        opset_version=BASE_OPSET,
        verbose=False,
    )
    assert translated is not None
    return translated.model_proto


@contextmanager
def _reference_kernels(model: LanguageModel) -> Iterator[None]:
    """Context in which all layers compute by the reference kernels, whose ops `Lowering` replaces."""
    parts: list[Any] = [part for part in model.modules() if hasattr(part, "backend")]
    before = [(part, part.backend, getattr(part, "backends", None)) for part in parts]
    try:
        for part, _, backends in before:
            part.backend = "reference"
            if backends is not None:
                part.backends = {}
        yield
    finally:
        for part, backend, backends in before:
            part.backend = backend
            if backends is not None:
                part.backends = backends


def _require_lowered(program: Any) -> None:
    """Raise a SeqmixError if the program has an op that ONNX does not have and `LOWERINGS` has no function for."""
    for node in program.graph.nodes:
        target = node.target
        if node.op == "call_function" and getattr(target, "namespace", None) == "seqmix":
            raise SeqmixError(
                f"the op {target} cannot be exported to ONNX: interop/onnx/lowering.py has no function for it"
            )


def _name_dimensions(graph: ModelProto, layout: StateLayout) -> None:
    """Give symbolic dimensions the names of `layout`: the exporter numbers them."""
    shapes = [("batch", "length"), *(leaf.shape for leaf in layout.leaves.values())]
    new_names = {}
    for value, shape in zip(graph.graph.input, shapes, strict=True):
        for dim, name in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            if dim.dim_param:
                new_names[dim.dim_param] = str(name)
    for value in (*graph.graph.input, *graph.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda match: new_names.get(match[0], match[0]), dim.dim_param)


def _remove_traces(graph: ModelProto) -> None:
    """Remove shapes of intermediate values, and where in the source a node comes from."""
    del graph.graph.value_info[:]
    del graph.graph.metadata_props[:]
    for entry in (*graph.graph.node, *graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        del entry.metadata_props[:]
        entry.doc_string = ""


def _use_standard(graph: ModelProto) -> None:
    """Take LinearAttention from the standard, which has the same inputs and attributes."""
    for node in graph.graph.node:
        if node.domain == CONTRIB:
            node.domain = ""
    kept = [entry for entry in graph.opset_import if entry.domain not in ("", CONTRIB)]
    del graph.opset_import[:]
    graph.opset_import.extend(kept)
    graph.opset_import.add(domain="", version=STANDARD_OPSET)
