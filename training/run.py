"""A finished or stopped run on disk, read back."""

from pathlib import Path

import torch

from ..models import LanguageModel, build_model, load_tokenizer
from ..registry import load
from . import checkpoint
from .config import PRESETS, RunConfig
from .data import tokenizer_of
from .loop import CONFIG_FILE


def read_config(run: Path) -> RunConfig:
    """The resolved configuration of a run.

    Raises:
        CheckpointError: the folder is no run.
        ConfigError: its configuration cannot be used any more.
    """
    if not (run / CONFIG_FILE).is_file():
        what = f"holds no {CONFIG_FILE}" if run.is_dir() else "is a file" if run.exists() else "does not exist"
        raise checkpoint.CheckpointError(f"{run} is no run: it {what}; a run is a folder that `seqmix train` wrote")
    return load(RunConfig, run / CONFIG_FILE, presets=PRESETS)


def load_run(run: str | Path, *, device: torch.device | str = "cpu") -> LanguageModel:
    """The trained model of a run, from its newest checkpoint, with the run's tokenizer: ready to generate.

    Raises:
        SeqmixError: the folder is no run, its checkpoint is missing, damaged or of another model, or its vocabulary
            cannot be read.
    """
    run = Path(run)
    config = read_config(run)
    model = build_model(config.model, device=device)
    model.tokenizer = load_tokenizer(tokenizer_of(run, config))
    checkpoint.load_model(checkpoint.latest(run), model)
    return model.eval()
