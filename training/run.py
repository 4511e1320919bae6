"""A finished or stopped run on disk, read back."""

from pathlib import Path

import torch

from ..models import LanguageModel, Tokenizer, build_model, load_tokenizer
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
    """The trained model of a run, from its newest checkpoint, ready to generate.

    Raises:
        SeqmixError: the folder is no run, or its checkpoint is missing, damaged or of another model.
    """
    run = Path(run)
    model = build_model(read_config(run).model, device=device)
    checkpoint.load_model(checkpoint.latest(run), model)
    return model.eval()


def load_run_tokenizer(run: str | Path) -> Tokenizer:
    """The tokenizer of a run: its own copy of the vocabulary, or bytes.

    Raises:
        SeqmixError: the folder is no run, or its vocabulary cannot be read.
    """
    return load_tokenizer(tokenizer_of(Path(run), read_config(Path(run))))
