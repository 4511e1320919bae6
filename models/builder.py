"""From a configuration to a model: built on `meta` (no memory), then materialised and initialised."""

import torch

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
) -> LanguageModel:
    """Build and initialise a model.

    Args:
        config: the model.
        device: where its parameters go.
        dtype: the parameters' dtype.
        activations: the activations' dtype, which autocast may narrow; the parameters' when None. The kernel backend
            of a layer with a `backend` is chosen for it.
        seed: the parameters are a function of it; the global generator is not changed.

    Raises:
        SeqmixError: `config` is no ModelConfig, a block does not fit `d_model`, the memory is too small for the
            parameters, or a backend that it names cannot run here.
    """
    if not isinstance(config, ModelConfig):
        given = type(config).__name__
        raise SeqmixError(f"build_model needs a ModelConfig, as load_config('retnet-tiny').model is, not a {given}")
    model = _allocated(build_meta(config).to(dtype), device)
    model.tie()  # to_empty gave each module its own matrix
    with torch.no_grad():
        for tensor in _numbers(model).values():
            tensor.fill_(torch.nan)
    device = model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.reset_parameters()
    for name, tensor in _numbers(model).items():
        if tensor.isnan().any():
            raise ContractError(f"{name} was left uninitialised: reset_parameters of its module must set it")
    model.resolve_backends(activations or dtype)
    use_onednn_linear(model)
    return model


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error: Python's and NumPy's, or torch's of any device."""
    words = ("DefaultCPUAllocator", "out of memory")  # not "memory" alone: an illegal access is something else
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _allocated(model: LanguageModel, device: torch.device | str) -> LanguageModel:
    """The model of `build_meta` with uninitialised memory.

    Raises:
        SeqmixError: there is not enough memory.
    """
    parameters = list(model.parameters())  # a tied one once
    count, size = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
    try:
        return model.to_empty(device=device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise  # such as a device that is not there
        raise SeqmixError(
            f"the model has {count:,} parameters, whose {size:,} bytes ({size / 2**30:,.1f} GiB) could not be "
            f"allocated on {device}: `seqmix show` lists them by layer"
        ) from None


def _numbers(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Floating-point parameters and buffers, which `to_empty` left uninitialised."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
