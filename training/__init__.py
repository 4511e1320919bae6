"""Training, on one process or many: data, optimizer, loop, checkpoints."""

from ..data import DATA, Corpus, DataConfig, Source, read_corpus
from ..data.corpus_config import DatasetConfig
from ..data.kinds.text import TextConfig
from .checkpoint import CheckpointError, Choice
from .config import PRESETS, DistributedConfig, RunConfig, TrainingConfig, load_config
from .run import TrainingError, train
from .saved_prompt_cache import load_reading, save_reading
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
    "load_reading",
    "load_run",
    "read_config",
    "read_corpus",
    "save_reading",
    "train",
]
