"""Training, on one process or many: optimizer, training loop, checkpoints."""

from ..configs import PRESETS
from .checkpoint.files import CheckpointError, Choice
from .checkpoint.saved_prompt_cache import load_prompt_cache, save_prompt_cache
from .checkpoint.saved_run import export_run, load_run, read_config
from .checkpoint.status import Status, read_status
from .config import DistributedConfig, RunConfig, TrainingConfig
from .run import TrainingError, train
from .warm_start import load_config

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Choice",
    "DistributedConfig",
    "RunConfig",
    "Status",
    "TrainingConfig",
    "TrainingError",
    "export_run",
    "load_config",
    "load_prompt_cache",
    "load_run",
    "read_config",
    "read_status",
    "save_prompt_cache",
    "train",
]
