"""From a configuration to a model: built on `meta` (no memory), then materialised and initialised."""

import torch

from ..mixers import ContractError
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
    seed: int = 0,
) -> LanguageModel:
    """Build and initialise a model.

    Args:
        config: the model.
        device: where its parameters go.
        dtype: the parameters' dtype.
        seed: the parameters are a function of it; the global generator is left as it was.

    Raises:
        SeqmixError: a block does not fit `d_model`.
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
    return model


def _numbers(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers that can be poisoned: what `to_empty` left without values."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
