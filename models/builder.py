"""Build a model from its configuration: first on `meta` (no memory), then materialised and initialised."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..mixers import ContractError
from ..registry import OutOfMemoryError, SeqmixError
from .config import ModelConfig
from .cpu_linear import use_fast_linear
from .language_model import LanguageModel


def build_meta(config: ModelConfig) -> LanguageModel:
    """Build a model on `meta`: shapes and dtypes without memory.

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
        config: the model's configuration.
        device: the device of the parameters.
        dtype: the dtype of the parameters.
        activations: the dtype of the activations, for which kernel backends are chosen; under autocast it is narrower
            than `dtype`. None means `dtype`.
        seed: determines the initial parameters; the global random generator is not changed.
        shard: function that replaces the parameters of a module by shards. It is called with each block once this is
            initialised, and then with the model. A block is allocated only after the previous one is sharded. The
            initial values do not depend on sharding.
        assign: called with a parameter, which `shard` may have sharded, and the full tensor to copy into it.

    Raises:
        SeqmixError: `config` is not a ModelConfig, a block does not fit `d_model`, the parameters do not fit into
            memory, or a backend that a layer names cannot run here.
    """
    if not isinstance(config, ModelConfig):
        name = type(config).__name__
        raise SeqmixError(f"build_model expects a ModelConfig, got a {name}: pass load_config('retnet-tiny').model")
    model = build_meta(config).to(dtype)
    names = {block: f"blocks.{index}." for index, block in reversed(list(enumerate(model.blocks)))}
    with _explain_memory(model, device):
        # allocate everything first: a model that does not fit is refused before any parameter is initialised
        rest = (child for name, child in model.named_children() if name != "blocks")
        for module in (model,) if shard is None else rest:
            module.to_empty(device=device)
        model.tie()  # to_empty has given each module its own matrix
        device = model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            for block in model.distinct_blocks:
                if shard is not None:
                    block.to_empty(device=device)
                with _initialising({names[block] + name: tensor for name, tensor in _floating_point(block).items()}):
                    block.reset_parameters()
                if shard is not None:
                    shard(block)
            outside = {name: x for name, x in _floating_point(model).items() if not name.startswith("blocks.")}
            with _initialising(outside):
                model.apply_model_init(assign)
        if shard is not None:
            shard(model)
    model.resolve_backends(activations or dtype)
    use_fast_linear(model)
    return model


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error is an out-of-memory error: Python's, NumPy's, or torch's on any device."""
    words = ("DefaultCPUAllocator", "out of memory")  # "memory" alone would match illegal memory accesses
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


@contextmanager
def _explain_memory(model: LanguageModel, device: torch.device | str) -> Iterator[None]:
    """Context that turns an out-of-memory error into an OutOfMemoryError with the size of the model."""
    parameters = list(model.parameters())  # lists a tied parameter once
    count = sum(p.numel() for p in parameters)
    size = sum(p.nbytes for p in parameters)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise  # e.g. the device does not exist
        raise OutOfMemoryError(
            f"out of memory on {device}: the model has {count:,} parameters, {size:,} bytes ({size / 2**30:,.1f} GiB); "
            "`seqmix show` lists them by layer"
        ) from None


@contextmanager
def _initialising(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Context that checks that its body initialises all of these tensors, given by name.

    Raises:
        ContractError: a tensor was left uninitialised.
    """
    for tensor in tensors.values():
        tensor.fill_(torch.nan)
    yield
    for name, tensor in tensors.items():
        if tensor.isnan().any():
            raise ContractError(f"{name} was left uninitialised: set it in reset_parameters of its module")


def _floating_point(module: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point parameters and buffers by name."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
