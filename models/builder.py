"""From a configuration to a model: built on `meta` (no memory), then materialised and initialised."""

import torch

from ..mixers import ContractError
from ..registry import SeqmixError
from .config import ModelConfig
from .language_model import LanguageModel


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
        activations: that of what is computed, which autocast may narrow; the parameters' when None. The kernels of a
            layer with a `backend` are chosen for it.
        seed: the parameters are a function of it; the global generator is left as it was.

    Raises:
        SeqmixError: a block does not fit `d_model`, or a backend that it names cannot run here.
    """
    model = build_meta(config).to(dtype).to_empty(device=device)
    model.tie()  # to_empty gave each module a matrix of its own
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
    for layer, block in zip(config.layers, model.blocks, strict=True):
        try:
            block.mixer.settle_backend(activations or dtype)
        except SeqmixError as error:
            raise SeqmixError(f"model.blocks.{layer}.mixer: {error}") from error
    return model


def _numbers(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers that can be poisoned: what `to_empty` left without values."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
