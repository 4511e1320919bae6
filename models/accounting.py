"""What a model costs, without allocating it: parameters, operations, state, activations, by layer.

The model is built on `meta`; operations are counted by the modules' own formulas, activations by running one layer of
each kind (of the same parameters) on fake tensors and adding up what autograd saves.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from ..blocks import Block
from ..mixers.state import nbytes, to_dict
from .builder import build_meta
from .config import ModelConfig
from .language_model import MATMULS, LanguageModel


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer."""

    block: str
    """The block's name in the configuration."""
    mixer: str
    """The mixer's kind."""
    mixer_parameters: int
    ffn_parameters: int
    """Parameters of the feed-forward network; norms are in `parameters`."""
    parameters: int
    """All parameters of the layer."""
    flops_per_token: int
    """FLOPs per token of matrix products, forward, at the given length in the layer's default paradigm."""
    state_elements: int
    """Elements of the state of one sequence, without positions, after the given length."""
    state_bytes: int
    """Bytes of that state."""
    activation_bytes: int
    """Activation memory: what forward saves for backward, for one sequence of the given length and dtype."""
    input_bytes: int
    """Of the layer's input, which is all that it saves with activation checkpointing."""
    matmul_bytes: int
    """Results of linear layers, which it saves too with `matmuls`."""


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """A whole model; the sums are over its layers, embedding, final norm and output projection."""

    length: int
    """The sequence length that operations, growing states and activations are counted at."""
    layers: tuple[LayerCost, ...]
    parameters: int
    """All parameters, a tied matrix once."""
    embedding_parameters: int
    """Parameters of embedding and output projection."""
    parameter_bytes: int
    flops_per_token: int
    """FLOPs per token of matrix products, forward, output projection included."""
    state_elements: int
    state_bytes: int
    activation_bytes: int

    @property
    def body_parameters(self) -> int:
        """Parameters outside embedding and output projection: the figure papers quote."""
        return self.parameters - self.embedding_parameters

    def checkpointed_bytes(self, *, matmuls: bool) -> int:
        """Activation memory with activation checkpointing, with that of the one layer that backward recomputes."""
        kept = sum(layer.input_bytes + matmuls * layer.matmul_bytes for layer in self.layers)
        rest = self.activation_bytes - sum(layer.activation_bytes for layer in self.layers)
        return rest + kept + max(layer.activation_bytes for layer in self.layers)


def account(config: ModelConfig, *, length: int = 2048, dtype: torch.dtype = torch.float32) -> ModelCost:
    """Count what a model costs.

    Args:
        config: the model.
        length: tokens of one sequence.
        dtype: of parameters and activations.

    Raises:
        SeqmixError: a block does not fit `d_model`.
    """
    model = build_meta(config).to(dtype)
    saved: dict[object, dict[str, int]] = {}
    layers = []
    for name, block in zip(config.layers, model.blocks, strict=True):
        kind = name, *((key, parameter.shape) for key, parameter in block.named_parameters())
        if kind not in saved:
            saved[kind] = _saved_bytes(block, length, config.d_model, dtype)
        layers.append(_layer(name, block, length, saved[kind]))
    embedding = sum(matrix.numel() for matrix in {model.embedding.weight, model.head.weight})
    parameters = _count(model)
    # logits and their gradient, in float32, and the input of the output projection
    head = length * (2 * 4 * config.vocab_size + 2 * config.d_model * dtype.itemsize)
    return ModelCost(
        length=length,
        layers=tuple(layers),
        parameters=parameters,
        embedding_parameters=embedding,
        parameter_bytes=parameters * dtype.itemsize,
        flops_per_token=flops_per_token(model, length),
        state_elements=sum(layer.state_elements for layer in layers),
        state_bytes=sum(layer.state_bytes for layer in layers),
        activation_bytes=sum(layer.activation_bytes for layer in layers) + head,
    )


def flops_per_token(model: LanguageModel, length: int) -> int:
    """FLOPs per token of matrix products, forward, in the layers' default paradigms, output projection included."""
    readout = 0 if model.readout is None else sum(p.numel() for p in model.readout.parameters() if p.ndim == 2)
    return sum(_flops(block, length) for block in model.blocks) + 2 * (readout + model.head.weight.numel())


def _flops(block: Block, length: int) -> int:
    """FLOPs per token of one layer."""
    ffn = 0 if block.ffn is None else block.ffn.flops(length)
    return (block.mixer.flops(length, block.mixer.paradigm) + ffn) // length


def _layer(name: str, block: Block, length: int, saved: dict[str, int]) -> LayerCost:
    state = block.mixer.init_state(1, max_length=length)
    return LayerCost(
        block=name,
        mixer=block.mixer.kind,
        mixer_parameters=_count(block.mixer),
        ffn_parameters=0 if block.ffn is None else _count(block.ffn),
        parameters=_count(block),
        flops_per_token=_flops(block, length),
        state_elements=sum(leaf.numel() for leaf in to_dict(state).values() if leaf.is_floating_point()),
        state_bytes=nbytes(state),
        **saved,
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class _Matmuls(TorchDispatchMode):
    """Bytes of the results that activation checkpointing `matmuls` saves."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.total += found.nbytes if func in MATMULS else 0
        return found


def _saved_bytes(block: Block, length: int, d_model: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that autograd saves for one layer, without parameters, and with activation checkpointing.

    The layer runs on fake tensors, which have no memory but say that they are on a CPU: on `meta`, torch would take
    attention's quadratic form, which no device does.
    """
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        # a view keeps the whole storage alive, and several views count once
        if id(x) not in own and (x._base is None or id(x._base) not in own):
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FakeTensorMode():
        tensors = {
            name: torch.empty(x.shape, dtype=x.dtype, requires_grad=x.requires_grad)
            for name, x in (*block.named_parameters(), *block.named_buffers())
        }
        own = {id(x) for x in tensors.values()}
        x = torch.empty(1, length, d_model, dtype=dtype, requires_grad=True)
        first = torch.empty_like(x, requires_grad=True) if block.mixer.takes_first_values else None
        own.add(id(first))  # the first layer's, which saves them
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), _Matmuls() as matmuls:
            out = functional_call(block, tensors, (x, None, first))  # noqa: F841 the graph must live while it is counted
        return {"activation_bytes": sum(storages.values()), "input_bytes": x.nbytes, "matmul_bytes": matmuls.total}
