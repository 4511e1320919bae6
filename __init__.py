"""seqmix: sequence mixers as plug-ins.

A sequence mixer is a causal map (x, state) -> (y, state'); `SequenceMixer` states its contract. One YAML file assembles
mixers, feed-forward networks and norms into a language model.
"""

from .mixers import MIXERS, ContractError, MixerConfig, Paradigm, SequenceMixer, Traits
from .models import LanguageModel, ModelConfig, Sampling, account, build_model, generate_text, stream_text
from .registry import ConfigError, SeqmixError
from .training import RunConfig, load_config, load_run, train

__version__ = "0.1.0"

__all__ = [
    "MIXERS",
    "ConfigError",
    "ContractError",
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
