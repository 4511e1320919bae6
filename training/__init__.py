"""Training on one process: text, optimizer, loop, checkpoints."""

from .checkpoint import CheckpointError
from .config import PRESETS, DataConfig, DatasetConfig, RunConfig, TrainingConfig, load_config
from .data import Corpus, read_corpus
from .loop import TrainingError, train
from .run import load_run, read_config

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Corpus",
    "DataConfig",
    "DatasetConfig",
    "RunConfig",
    "TrainingConfig",
    "TrainingError",
    "load_config",
    "load_run",
    "read_config",
    "read_corpus",
    "train",
]
