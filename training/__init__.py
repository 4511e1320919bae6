"""Training, on one process or many: data, optimizer, loop, checkpoints."""

from ..data import DATA, Corpus, DataConfig, Source, read_corpus
from ..data.corpus_config import DatasetConfig
from ..data.kinds.text import TextConfig
from .checkpoint import CheckpointError, Choice
from .config import PRESETS, DistributedConfig, RunConfig, TrainingConfig, load_config
from .run import TrainingError, train
from .saved_prompt_cache import load_prompt_cache, save_prompt_cache
from .saved_run import export_run, load_run, read_config

__all__ = [
    "DATA",
    "PRESETS",
    "CheckpointError",
    "Choice",
    "Corpus",
    "DataConfig",
    "DatasetConfig",
    "DistributedConfig",
    "RunConfig",
    "Source",
    "TextConfig",
    "TrainingConfig",
    "TrainingError",
    "export_run",
    "load_config",
    "load_prompt_cache",
    "load_run",
    "read_config",
    "read_corpus",
    "save_prompt_cache",
    "train",
]
