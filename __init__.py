"""seqmix: sequence mixers as plug-ins.

A sequence mixer is a causal map (x, state) -> (y, state'); `SequenceMixer` states its contract. One YAML file assembles
mixers, feed-forward networks and norms into a language model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .former_modules import find_former_modules

if TYPE_CHECKING:
    from .mixers import MIXERS, Call, ContractError, MixerConfig, Paradigm, SequenceMixer, Traits
    from .models import LanguageModel, ModelConfig, Sampling, account, build_model, generate_text, stream_text
    from .registry import ConfigError, DataError, SeqmixError
    from .training import RunConfig, load_config, load_run, train

__version__ = "0.3.0"

__all__ = [
    "MIXERS",
    "Call",
    "ConfigError",
    "ContractError",
    "DataError",
    "LanguageModel",
    "MixerConfig",
    "ModelConfig",
    "Paradigm",
    "RunConfig",
    "Sampling",
    "SeqmixError",
    "SequenceMixer",
    "Traits",
    "account",
    "build_model",
    "generate_text",
    "load_config",
    "load_run",
    "stream_text",
    "train",
]

_PACKAGES = ("registry", "mixers", "models", "training")
"""Packages that define the names above, lowest layer first: importing one imports only those below it."""


find_former_modules()


def __getattr__(name: str) -> Any:
    """Import a public name or a package on first use, so that the command answers --help without importing torch."""
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    if name in __all__:
        for package in _PACKAGES:
            module = import_module(f".{package}", __name__)
            if name in module.__all__:
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
