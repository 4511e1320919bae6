"""A finished or stopped run on disk, read back; and its weights as one file to give away."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..models import LanguageModel, ModelConfig, SubwordTokenizer, build_model
from ..registry import load
from . import checkpoint, train_state
from .checkpoint import CheckpointError, Choice
from .config import PRESETS, RunConfig
from .run_dir import CONFIG_FILE

EXPORTED_CONFIG, EXPORTED_TOKENIZER = "seqmix.config", "seqmix.tokenizer"
"""The names under which a file of weights has the run's configuration and its vocabulary (unless bytes), as JSON."""


def read_config(run: Path, changes: Sequence[str] = ()) -> RunConfig:
    """The resolved configuration of a run, with changes as "dotted.path=value".

    Raises:
        CheckpointError: the folder is no run.
        ConfigError: its configuration cannot be used any more.
    """
    if not (run / CONFIG_FILE).is_file():
        what = f"holds no {CONFIG_FILE}" if run.is_dir() else "is a file" if run.exists() else "does not exist"
        raise CheckpointError(f"{run} is no run: it {what}; a run is a folder that `seqmix train` wrote")
    return load(RunConfig, run / CONFIG_FILE, changes, presets=PRESETS)


def load_run(
    run: str | Path,
    *,
    device: torch.device | str = "cpu",
    choice: Choice = "newest",
    tell: Callable[[str], object] = warnings.warn,
) -> LanguageModel:
    """The trained model of a run, or of a file that `export_run` wrote, with its tokenizer: ready to generate.

    Args:
        run: the run's folder, or the file.
        device: where the model goes.
        choice: which of a run's checkpoints: the newest, the best, or that of a step. Where its parameters are damaged,
            it is the one before it.
        tell: called with a sentence for each checkpoint that was passed over.

    Raises:
        SeqmixError: it is no run and no such file, or is missing, damaged or of another model, or its vocabulary cannot
            be read.
    """
    run = Path(run)
    if run.is_file():
        return _load_file(run, device)
    model, _ = _load_checkpoint(run, read_config(run), device, choice, tell)
    return model.eval()


def export_run(
    run: Path, out: Path, *, choice: Choice = "newest", tell: Callable[[str], object] = warnings.warn
) -> int:
    """Write the weights of a run to one safetensors file, with its configuration in the metadata.

    Args:
        run: the run's folder.
        out: the file, which must not exist.
        choice: which checkpoint, as in `load_run`.
        tell: as in `load_run`.

    Returns:
        The step of the checkpoint.

    Raises:
        SeqmixError: it is no run, its checkpoints are missing or damaged, or the file cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already: give --out the name of a new file")
    config = read_config(run)
    model, step = _load_checkpoint(run, config, "cpu", choice, tell)
    metadata = {"format": "pt", "seqmix.step": str(step), EXPORTED_CONFIG: config.model_dump_json()}
    if model.tokenizer is not None and model.tokenizer.vocabulary is not None:
        metadata[EXPORTED_TOKENIZER] = model.tokenizer.vocabulary.decode()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error
    checkpoint.write_tensors(out, train_state.parameters_of(model), metadata)
    return step


def _load_checkpoint(
    run: Path, config: RunConfig, device: torch.device | str, choice: Choice, tell: Callable[[str], object]
) -> tuple[LanguageModel, int]:
    # nothing else is needed: damaged moments are no reason to pass over good parameters
    found = checkpoint.find(run, choice, parts=(train_state.MODEL,))
    for note in found.notes:
        tell(note)
    model = build_model(config.model, device=device)
    model.tokenizer = config.data.tokenizer_of(run)
    train_state.load_model(found.folder, model)
    return model, found.manifest.step


def _load_file(file: Path, device: torch.device | str) -> LanguageModel:
    found, metadata = checkpoint.read_tensors(file)
    try:
        # only the model's part: how it was trained may be of another version
        config = ModelConfig.model_validate(json.loads(metadata[EXPORTED_CONFIG])["model"])
    except KeyError as error:
        raise CheckpointError(f"{file} has weights and no configuration: it needs a file of `seqmix export`") from error
    except (ValueError, TypeError) as error:
        reason = "; ".join(str(error).splitlines())
        raise CheckpointError(f"{file} has a configuration that cannot be used: {reason}") from error
    model = build_model(config, device=device)
    if EXPORTED_TOKENIZER in metadata:
        model.tokenizer = SubwordTokenizer(metadata[EXPORTED_TOKENIZER].encode(), f"in {file}")
    train_state.fill(file, found, train_state.parameters_of(model))
    return model.eval()
