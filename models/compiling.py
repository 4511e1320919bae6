"""Compilation of a model: block by block for training, all layers in one graph for decoding and prefill."""

import sys
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import Block
from ..mixers.base.traits import require_compiles
from ..ops.kernels.native.linear import may_multiply, multiply_rows_compiled
from ..ops.runtime.materialize import write_to_memory
from ..registry import SeqmixError
from .language_model import LanguageModel

_compiled: WeakKeyDictionary[LanguageModel, dict[FunctionType, Callable[..., Any]]] = WeakKeyDictionary()
"""Compiled functions of each model, by the uncompiled function."""

RECOMPILE_LIMIT = 8
"""torch's limit of graphs per code object, for the sizes and options of a layer."""


class CompileError(SeqmixError):
    """Error of torch.compile, for example because a C++ compiler is missing."""


def compile_blocks(model: LanguageModel) -> int:
    """Compile each kind of block by itself (`fullgraph`), so that a deep model compiles as fast as a shallow one.

    Dynamo compiles at most eight graphs per code object, and all blocks share the code of `Block.forward`. Each kind
    therefore gets a copy of that code: its blocks share graphs, and those of other kinds and other models do not count
    towards the limit. Where the stream grows with depth, every block is a kind, with a graph for each of its layers.

    Returns:
        The number of kinds of blocks; each is compiled at its first call.

    Raises:
        ContractError: a mixer cannot be compiled.
    """
    _require_compiles(model)
    grows = model.config.residual.grows
    kinds = {block: str(i) if grows else kind for i, (block, kind) in enumerate(model.distinct_blocks.items())}
    kinds = {block: f"{kind}_reader" if block.mixer.takes_shared_kv else kind for block, kind in kinds.items()}
    forwards = {kind: copy_of(Block.forward, f"forward_{kind}") for kind in kinds.values()}
    options: dict[str, Any] = {}
    if grows and len(kinds) < len(model.blocks):  # shared blocks
        options["recompile_limit"] = RECOMPILE_LIMIT + len(model.blocks)
    for block, kind in kinds.items():
        # set on the instance, so that hooks and parameter names stay as they are
        block.forward = torch.compile(MethodType(forwards[kind], block), fullgraph=True, **options)
    return len(forwards)


def compiled_for(model: LanguageModel, function: FunctionType, **options: Any) -> Callable[..., Any]:
    """Return a function of the model, compiled as one graph of all layers; `options` are those of torch.compile.

    The function is compiled at its first call, and the same compiled function is returned every time.

    Raises:
        CompileError: the compiler has failed; raised by a call of the function, before it computes anything.
        ContractError: a mixer cannot be compiled.
    """
    _require_compiles(model)
    functions = _compiled.setdefault(model, {})
    if function not in functions:
        compiled = torch.compile(copy_of(function, function.__name__), fullgraph=True, **options)

        def call(*args: Any, **options: Any) -> Any:
            try:
                return compiled(*args, **options)
            except RuntimeError as error:
                if (reason := compiler_failure(error)) is None:
                    raise
                raise CompileError(f"torch.compile has failed ({reason})") from None

        functions[function] = call
    return functions[function]


def _require_compiles(model: LanguageModel) -> None:
    for block in model.blocks:
        require_compiles(block.mixer.traits, block.mixer.kind)


def compiler_failure(error: Any) -> str | None:
    """Return in one line the reason why torch.compile has failed; None if `error` is any other exception."""
    dynamo = sys.modules.get("torch._dynamo.exc")  # every compilation imports it
    if dynamo is None or not isinstance(error, dynamo.BackendCompilerFailed):
        return None
    inner = error.inner_exception
    return f"{type(inner).__name__}: {inner}".partition("\n")[0]


def rows_as_sums(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compile with inductor, but write products of one row on a CPU as sums, which inductor turns into loops.

    Such a product is bound by memory bandwidth. BLAS computes it on one core, at a third to a half of the bandwidth;
    the loop runs on all cores and is fused with the operations around it. Products of a few rows take the native
    kernel, as in eager steps.
    """
    for node in graph.graph.find_nodes(op="call_function", target=F.linear):
        row, weight, *bias = node.args
        x = row.meta.get("example_value") if isinstance(row, torch.fx.Node) else None
        matrix = weight.meta.get("example_value") if isinstance(weight, torch.fx.Node) else None
        if x is None or x.device.type != "cpu" or not all(isinstance(size, int) for size in x.shape):
            continue
        rows = x.numel() // x.shape[-1]
        if rows == 1 < x.numel():
            node.target = _row_product
        elif matrix is not None and matrix.dtype == x.dtype and may_multiply(rows, matrix):
            node.target = multiply_rows_compiled
            node.args = (row, weight, *(bias or [None]))
    graph.recompile()
    return torch._dynamo.lookup_backend("inductor")(graph, inputs)


def _row_product(row: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of one row as a sum of products.

    The row is materialised first: if it were fused, its norm and activation would be recomputed for each output.
    """
    product = (weight * write_to_memory(row.reshape(-1), 0)).sum(-1)
    if bias is not None:
        product = product + bias
    return product.reshape(*row.shape[:-1], -1)


def copy_of(function: FunctionType, name: str) -> FunctionType:
    """Return a copy of a function with its own code object, whose graphs dynamo counts separately."""
    code = function.__code__.replace(co_name=name)
    copy = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
