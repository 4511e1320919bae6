"""Training, on one process or many: data, optimizer, loop, checkpoints."""

from .checkpoint import CheckpointError, Choice
from .config import PRESETS, DistributedConfig, RunConfig, TrainingConfig, load_config
from .data import DATA, Corpus, DataConfig, Source, read_corpus
from .data.kinds.text import DatasetConfig, TextConfig
from .loop import TrainingError, train
from .run import export_run, load_run, read_config
from .saved_state import load_reading, save_reading

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
