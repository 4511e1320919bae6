"""From a configuration to a model: built on `meta` (no memory), then materialised and initialised."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..mixers import ContractError
from ..registry import SeqmixError
from .config import ModelConfig
from .language_model import LanguageModel
from .onednn_linear import use_onednn_linear


def build_meta(config: ModelConfig) -> LanguageModel:
    """The model without memory: shapes and dtypes only.

    Raises:
        SeqmixError: a block does not fit `d_model`.
    """
    with torch.device("meta"):
        return LanguageModel(config)


def build_model(
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    activations: torch.dtype | None = None,
    seed: int = 0,
    shard: Callable[[nn.Module], object] | None = None,
    assign: Callable[[Tensor, Tensor], object] = Tensor.copy_,
) -> LanguageModel:
    """Build and initialise a model.

    Args:
        config: the model.
        device: where its parameters go.
        dtype: the parameters' dtype.
        activations: the activations' dtype, which autocast may narrow; the parameters' when None. The kernel backend
            of a layer with a `backend` is chosen for it.
        seed: the parameters are a function of it; the global generator is not changed.
        shard: called with each block once it is initialised, and at last with the model, to replace parameters by
            shards, whose values are those of a whole model. A block is allocated after the one before is sharded.
        assign: copies a full tensor into one of `shard`.

    Raises:
        SeqmixError: `config` is no ModelConfig, a block does not fit `d_model`, the memory is too small for the
            parameters, or a backend that it names cannot run here.
    """
    if not isinstance(config, ModelConfig):
        given = type(config).__name__
        raise SeqmixError(f"build_model needs a ModelConfig, as load_config('retnet-tiny').model is, not a {given}")
    model = build_meta(config).to(dtype)
    names = {block: f"blocks.{index}." for index, block in reversed(list(enumerate(model.blocks)))}
    with _explain_memory(model, device):
        # a whole model that does not fit is refused before any of it is written
        rest = (child for name, child in model.named_children() if name != "blocks")
        for module in (model,) if shard is None else rest:
            module.to_empty(device=device)
        model.tie()  # to_empty gave each module its own matrix
        device = model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            for block in model.distinct_blocks:
                if shard is not None:
                    block.to_empty(device=device)
                with _initialising({names[block] + name: tensor for name, tensor in _numbers(block).items()}):
                    block.reset_parameters()
                if shard is not None:
                    shard(block)
            with _initialising({name: x for name, x in _numbers(model).items() if not name.startswith("blocks.")}):
                model.reset_rest(assign)
        if shard is not None:
            shard(model)
    model.resolve_backends(activations or dtype)
    use_onednn_linear(model)
    return model


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error: Python's and NumPy's, or torch's of any device."""
    words = ("DefaultCPUAllocator", "out of memory")  # not "memory" alone: an illegal access is something else
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


@contextmanager
def _explain_memory(model: LanguageModel, device: torch.device | str) -> Iterator[None]:
    """Turn an error of memory into a SeqmixError with the model's size."""
    parameters = list(model.parameters())  # a tied one once
    count = sum(p.numel() for p in parameters)
    size = sum(p.nbytes for p in parameters)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise  # such as a device that is not there
        raise SeqmixError(
            f"the model has {count:,} parameters, whose {size:,} bytes ({size / 2**30:,.1f} GiB) could not be "
            f"allocated on {device}: `seqmix show` lists them by layer"
        ) from None


@contextmanager
def _initialising(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Require that the block sets all of these tensors, by name."""
    for tensor in tensors.values():
        tensor.fill_(torch.nan)
    yield
    for name, tensor in tensors.items():
        if tensor.isnan().any():
            raise ContractError(f"{name} was left uninitialised: reset_parameters of its module must set it")


def _numbers(module: nn.Module) -> dict[str, Tensor]:
    """Floating-point parameters and buffers, which `to_empty` left uninitialised."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
