"""Checkpoints: tensors in safetensors, written whole or not at all. Nothing is ever unpickled.

RUN/config.yaml                          the resolved configuration
RUN/metrics.jsonl                        one line a measurement
RUN/checkpoints/step-000500/model.safetensors        parameters
RUN/checkpoints/step-000500/optimizer.safetensors    the optimizer's moments
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models import LanguageModel, ModelConfig
from ..registry import SeqmixError

MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"


class CheckpointError(SeqmixError):
    """A checkpoint is missing, damaged, or of another model."""


def save(run: Path, step: int, model: LanguageModel, optimizer: torch.optim.Optimizer, keep: int) -> Path:
    """Write the checkpoint of a step and drop all but the newest `keep`; the folder appears when it is complete."""
    folder = run / "checkpoints" / _name(step)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    moments = {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for file, tensors in ((MODEL_FILE, parameters), (OPTIMIZER_FILE, moments)):
        metadata = {"seqmix.step": str(step), "seqmix.model": model.config.model_dump_json()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial / file, metadata)
        _flush(partial / file)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _flush(folder.parent)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folders = (f for f in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", f.name) and f.is_dir())
    return sorted(folders, key=step_of)


def latest(run: Path) -> Path:
    """The newest checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    if not (found := checkpoints(run)):
        raise CheckpointError(f"{run} holds no checkpoint")
    return found[-1]


def step_of(folder: Path) -> int:
    """The step a checkpoint was written after."""
    return int(folder.name.removeprefix("step-"))


def load_model(folder: Path, model: LanguageModel) -> None:
    """Put a checkpoint's parameters into a model.

    Raises:
        CheckpointError: the file is missing or damaged, or holds other parameters than the model's.
    """
    file = folder / MODEL_FILE
    found = _read(file)
    _require_same_model(file, model.config)
    _fill(file, found, {name: parameter.data for name, parameter in model.named_parameters()})


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's moments into an optimizer of the model.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to other parameters than the model's.
    """
    file = folder / OPTIMIZER_FILE
    found = _read(file)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    wanted = {
        f"{key}.{name}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    _fill(file, found, wanted)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist")
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error


def _require_same_model(file: Path, config: ModelConfig) -> None:
    """Two configurations may have parameters of the same shapes, and be different functions of them."""
    with safe_open(file, "pt") as tensors:
        written = (tensors.metadata() or {}).get("seqmix.model")
    try:
        same = written is None or ModelConfig.model_validate(json.loads(written)) == config
    except ValueError:
        same = False
    if not same:
        raise CheckpointError(
            f"{file} was trained with another model than the configuration beside it describes: "
            "undo what was changed in config.yaml under `model`"
        )


def _fill(file: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    if missing := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(f"{file} is of another model: it lacks {missing[0]}" + _more(missing))
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(f"{file} is of another model: it has {extra[0]}, which this one has not" + _more(extra))
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise CheckpointError(
                f"{file} is of another model: its {name} is {list(found[name].shape)}, "
                f"and {list(tensor.shape)} is needed"
            )
    for name, tensor in wanted.items():
        tensor.copy_(found[name])


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _flush(path: Path) -> None:
    """Make sure that the disk has it: a renamed folder must not outlive its contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
