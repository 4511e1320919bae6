"""Training on one process: text, optimizer, loop, checkpoints."""

from .checkpoint import CheckpointError, Choice
from .config import PRESETS, DataConfig, DatasetConfig, RunConfig, TrainingConfig, load_config
from .data import Corpus, read_corpus
from .loop import TrainingError, train
from .run import export_run, load_run, read_config

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Choice",
    "Corpus",
    "DataConfig",
    "DatasetConfig",
    "RunConfig",
    "TrainingConfig",
    "TrainingError",
    "export_run",
    "load_config",
    "load_run",
    "read_config",
    "read_corpus",
    "train",
]
