"""Costs of a model by layer, without allocating it: parameters, FLOPs, state and activation memory.

The model is built on `meta`. FLOPs are counted by the modules' own formulas. Activation memory is measured: one layer
of each kind runs on fake tensors, and the bytes that autograd saves are added up. Both are those of the reference
kernels; other kernels may compute and save less.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..blocks import Block
from ..blocks.residual import Stream
from ..mixers.base.layer_call import LayerCall
from ..mixers.base.state import nbytes, to_dict
from ..ops.attention import SharedKV
from .builder import build_meta
from .config import ModelConfig
from .language_model import MATMULS, LanguageModel


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Costs of one layer of a model: parameters, FLOPs, state and activation memory."""

    block: str
    """Name of the block in the configuration."""
    mixer: str
    """Kind of the mixer."""
    mixer_parameters: int
    """Number of parameters of the mixer."""
    ffn_parameters: int
    """Number of parameters of the feed-forward network; norms count only in `parameters`."""
    parameters: int
    """Number of all parameters of the layer."""
    flops_per_token: int
    """Forward FLOPs of matrix products per token, for `ModelCost.length` tokens in the default paradigm."""
    state_elements: int
    """Number of elements of the state of one sequence after `length` tokens, without positions."""
    state_bytes: int
    """Bytes of the state of one sequence after `length` tokens, positions included."""
    activation_bytes: int
    """Activation memory: bytes that forward saves for backward, for one sequence of `length` tokens."""
    input_bytes: int
    """Bytes of the layer's input: all that the layer saves with activation checkpointing."""
    matmul_bytes: int
    """Bytes of the products with weight matrices, which activation checkpointing `matmuls` saves besides the input."""


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Costs of a whole model: layers, embedding, final norm and output projection."""

    length: int
    """Sequence length in tokens, at which FLOPs, growing states and activations are counted."""
    layers: tuple[LayerCost, ...]
    """Costs of each layer."""
    parameters: int
    """Number of all parameters; a tied matrix counts once."""
    embedding_parameters: int
    """Number of parameters of embedding, value embeddings and output projection; a tied matrix counts once."""
    body_parameters: int
    """Number of parameters outside embeddings and output projection, which papers quote."""
    parameter_bytes: int
    """Bytes of all parameters."""
    flops_per_token: int
    """Forward FLOPs of matrix products per token, output projection included."""
    state_elements: int
    """Number of elements of all layers' states of one sequence after `length` tokens, without positions."""
    state_bytes: int
    """Bytes of all layers' states of one sequence after `length` tokens, positions included."""
    activation_bytes: int
    """Activation memory in bytes for one sequence of `length` tokens: all layers, the logits and their gradient."""

    def checkpointed_bytes(self, *, matmuls: bool) -> int:
        """Return the activation memory in bytes with checkpointing, including the layer that backward recomputes.

        `matmuls` is True if the products with weight matrices are saved too.
        """
        saved = sum(layer.input_bytes + matmuls * layer.matmul_bytes for layer in self.layers)
        outside_layers = self.activation_bytes - sum(layer.activation_bytes for layer in self.layers)
        return outside_layers + saved + max(layer.activation_bytes for layer in self.layers)


def account(config: ModelConfig, *, length: int = 2048, dtype: torch.dtype = torch.float32) -> ModelCost:
    """Return the costs of a model.

    Args:
        config: the model's configuration.
        length: sequence length in tokens.
        dtype: the dtype of parameters and activations.

    Raises:
        SeqmixError: a block does not fit `d_model`.
    """
    model = build_meta(config).to(dtype)
    memory: dict[object, tuple[dict[str, int], _Stream]] = {}
    layers = []
    fake = FakeTensorMode()
    with fake:
        x = torch.empty(1, length, config.d_model, dtype=dtype, requires_grad=True)
        stream = _Stream(model.residual.start(x), frozenset(), frozenset())
    for index, (name, block) in enumerate(zip(config.layers, model.blocks, strict=True)):
        shapes = tuple((key, parameter.shape) for key, parameter in block.named_parameters())
        is_donor = index in model.kv_donors
        kind = (name, shapes, stream.key, is_donor)
        if kind not in memory:
            with fake:
                memory[kind] = _saved_bytes(block, stream, x, is_donor)
        saved, stream = memory[kind]
        layers.append(_layer(name, block, length, _flops(model, index, length), saved))
    tables = (table.weight for table in model.value_embeddings.values())
    embedding = sum(matrix.numel() for matrix in {model.embedding.weight, model.head.weight, *tables})
    parameters = _count(model)
    # logits and their gradient in float32, and the input of the output projection with its gradient
    head = length * (2 * 4 * config.vocab_size + 2 * config.d_model * dtype.itemsize)
    return ModelCost(
        length=length,
        layers=tuple(layers),
        parameters=parameters,
        embedding_parameters=embedding,
        body_parameters=parameters - embedding,
        parameter_bytes=parameters * dtype.itemsize,
        flops_per_token=flops_per_token(model, length),
        state_elements=sum(layer.state_elements for layer in layers),
        state_bytes=sum(layer.state_bytes for layer in layers),
        activation_bytes=sum(layer.activation_bytes for layer in layers) + head,
    )


def flops_per_token(model: LanguageModel, length: int) -> int:
    """Return a model's forward FLOPs of matrix products per token, for sequences of `length` tokens.

    Every layer uses its default paradigm; the output projection is included.
    """
    readout_weights = 0 if model.readout is None else sum(p.numel() for p in model.readout.parameters() if p.ndim == 2)
    layers = sum(_flops(model, index, length) for index in range(len(model.blocks)))
    after = model.residual.flops(model.config.first_branches[-1]) + 2 * (readout_weights + model.head.weight.numel())
    return layers + after


def _flops(model: LanguageModel, layer: int, length: int) -> int:
    """Return the forward FLOPs of matrix products per token in one layer, in its default paradigm."""
    block = model.blocks[layer]
    ffn = 0 if block.ffn is None else block.ffn.flops(length)
    first = model.config.first_branches[layer]
    residual = sum(each.flops(first + place) for place, each in enumerate(block.residuals))
    return (block.mixer.flops(length, block.mixer.paradigm) + ffn) // length + residual


def _layer(name: str, block: Block, length: int, flops: int, saved: dict[str, int]) -> LayerCost:
    """Return the costs of the layer `block`; `saved` has the results of `_saved_bytes`."""
    state = block.init_state(1, max_length=length)
    return LayerCost(
        block=name,
        mixer=block.mixer.kind,
        mixer_parameters=_count(block.mixer),
        ffn_parameters=0 if block.ffn is None else _count(block.ffn),
        parameters=_count(block),
        flops_per_token=flops,
        state_elements=sum(leaf.numel() for leaf in to_dict(state).values() if leaf.is_floating_point()),
        state_bytes=nbytes(state),
        **saved,
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class _Matmuls(TorchDispatchMode):
    """Context that adds up the bytes of the products that activation checkpointing `matmuls` saves."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += result.nbytes if func in MATMULS else 0
        return result


class _Stream(NamedTuple):
    """Residual stream between two layers, of fake tensors."""

    value: Stream
    saved: frozenset[int]
    """Storages of the stream that an earlier layer saves for its backward pass."""
    inputs: frozenset[int]
    """Storages of the stream that were an earlier layer's input."""

    @property
    def storages(self) -> dict[int, int]:
        """Bytes of the stream's storages."""
        return dict(map(_storage, _tensors(self.value)))

    @property
    def key(self) -> object:
        """All that a layer's memory depends on."""
        tensors = [(x.shape, x.stride(), _storage(x)[0]) for x in _tensors(self.value)]
        return tuple((shape, stride, at in self.saved, at in self.inputs) for shape, stride, at in tensors)


def _tensors(stream: Stream) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(stream) if isinstance(leaf, Tensor)]


def _storage(x: Tensor) -> tuple[int, int]:
    """Return the address of a tensor's storage, and its bytes."""
    return x.untyped_storage()._cdata, x.untyped_storage().nbytes()


class _Saved:
    """Tensor that autograd saves; it lives as long as the graph that the output needs."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _saved_bytes(block: Block, stream: _Stream, x: Tensor, is_donor: bool) -> tuple[dict[str, int], _Stream]:
    """Return the bytes that autograd saves for one layer, without and with checkpointing, and the stream after it.

    Parameters do not count, nor do tensors of the stream that an earlier layer saves. Values from outside have the
    dtype and the length of x.

    The layer runs on fake tensors, which have no memory but pretend to be on a CPU. On `meta`, torch would choose a
    quadratic form of attention that it uses on no real device.
    """
    holders: WeakSet[_Saved] = WeakSet()

    def pack(x: Tensor) -> _Saved:
        holder = _Saved(x)
        if id(x) not in excluded and (x._base is None or id(x._base) not in excluded):
            holders.add(holder)
        return holder

    tensors = {
        name: torch.empty(x.shape, dtype=x.dtype, requires_grad=x.requires_grad)
        for name, x in (*block.named_parameters(), *block.named_buffers())
    }
    excluded = {id(x) for x in tensors.values()}
    mixer = block.mixer
    width = mixer.value_width or x.shape[-1]
    first_values, token_values = (
        x.new_empty(*x.shape[:2], width, requires_grad=True) if takes else None
        for takes in (mixer.takes_first_values, mixer.takes_token_values)
    )
    excluded.add(id(first_values))  # the first layer saves its own values
    call = LayerCall(first_values=first_values, token_values=token_values, return_kv=is_donor)
    if mixer.takes_shared_kv:
        sizes: Any = mixer
        heads, *widths = sizes.cache_sizes
        k, v = (x.new_empty(*x.shape[:2], heads, width, requires_grad=True) for width in widths)
        excluded |= {id(k), id(v)}  # the layer that has them saves them
        call = call._replace(shared_kv=SharedKV(k, v, None, None))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor), _Matmuls() as matmuls:
        output = functional_call(block, tensors, (stream.value, call))
    # a view keeps the whole storage alive, and several views of it count once
    storages = dict(_storage(holder.tensor) for holder in holders)
    inputs = stream.storages | ({} if token_values is None else dict([_storage(token_values)]))
    kept = dict(_storage(x) for x in output.kv[:2]) if is_donor else {}  # keys and values, for later layers
    result = {
        "activation_bytes": sum(storages[at] for at in storages.keys() - stream.saved),
        "input_bytes": sum(inputs[at] for at in inputs.keys() - stream.inputs) + sum(kept.values()),
        "matmul_bytes": matmuls.total,
    }
    # an address tells storages apart only while they exist, so those that have left the stream are forgotten
    after = _Stream(output.y, frozenset(), frozenset())
    live = after.storages.keys()
    saved = (storages.keys() | stream.saved) & live
    return result, after._replace(saved=frozenset(saved), inputs=frozenset((inputs.keys() | stream.inputs) & live))
