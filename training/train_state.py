"""The training state as named tensors: parameters, optimizer state, and the carried recurrent state."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..mixers.contract import IMPLEMENTATION_FIELDS
from ..mixers.state import from_dict, map_state, to_dict
from ..models import LanguageModel, ModelConfig, ModelState
from .checkpoint import CheckpointError, file_of, read_tensors
from .ema import Ema
from .optim import AnyOptimizer, start_moments
from .sharding import assign

MODEL, OPTIMIZER, STATE, EMA = "model", "optimizer", "state", "ema"
"""The parts of a checkpoint."""


def gather(
    model: LanguageModel, optimizer: AnyOptimizer, state: ModelState | None, ema: Ema | None = None
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a run by part and name; not copies."""
    parts = {MODEL: parameters_of(model), OPTIMIZER: moments_of(model, optimizer)}
    if state is not None:
        parts[STATE] = to_dict(state)
    if ema is not None:
        parts[EMA] = parameters_of(model) | ema.parameters
    return parts


def parameters_of(model: LanguageModel) -> dict[str, Tensor]:
    """The parameters by name, a tied one once, and the buffers of the model's `state_dict`."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | buffers


def moments_of(model: LanguageModel, optimizer: AnyOptimizer) -> dict[str, Tensor]:
    """The optimizer state by name, such as "exp_avg.blocks.0.mixer.out_proj.weight"."""
    return {
        f"{key}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor | int | float)
    }


def metadata_of(config: ModelConfig, step: int) -> dict[str, str]:
    """The metadata of a file: the step and the model's configuration."""
    return {"seqmix.step": str(step), "seqmix.model": config.model_dump_json()}


def load_model(folder: Path, model: LanguageModel, part: str = MODEL) -> list[str]:
    """Load a checkpoint's parameters into a model; CheckpointError: they are missing, damaged, or another model's.

    Args:
        folder: the checkpoint.
        model: the model.
        part: `EMA` loads their moving average.

    Returns:
        One phrase per implementation field (`chunk_size`, ...) that differs from training, which changes rounding.
    """
    file = folder / file_of(part)
    found, metadata = read_tensors(file)
    changed = _require_same_model(file, metadata, model.config)
    fill(file, found, parameters_of(model))
    return changed


def load_optimizer(folder: Path, model: LanguageModel, optimizer: AnyOptimizer) -> None:
    """Load a checkpoint's optimizer state; CheckpointError: it is missing, damaged, or another model's."""
    file = folder / file_of(OPTIMIZER)
    found = read_tensors(file)[0]
    saved = [p for name, p in model.named_parameters() if any(key.endswith(f".{name}") for key in found)]
    start_moments(saved, optimizer)
    moments = moments_of(model, optimizer)
    fill(file, found, moments)
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        numbers = {key: value for key, value in state.items() if isinstance(value, int | float)}
        state |= {key: type(value)(moments[f"{key}.{name}"].item()) for key, value in numbers.items()}


def load_ema(folder: Path, model: LanguageModel, ema: Ema) -> None:
    """Load a checkpoint's moving average of the parameters, or begin one with them where it has none."""
    file = folder / file_of(EMA)
    if file.exists():
        fill(file, read_tensors(file)[0], parameters_of(model) | ema.parameters)
    else:
        ema.parameters = Ema(model, ema.decay).parameters


def load_state(folder: Path, model: LanguageModel, batch_size: int) -> ModelState:
    """The recurrent state of a checkpoint; CheckpointError: it is missing, damaged, or of another model or batch."""
    file = folder / file_of(STATE)
    found, like = read_tensors(file)[0], model.init_state(batch_size)
    _require_same_names(file, found, to_dict(like))
    if any(len(leaf) != batch_size for leaf in found.values()):
        raise CheckpointError(f"{file} has a state of another batch size than training.batch_size = {batch_size}")
    return map_state(lambda leaf: leaf.to(model.device), from_dict(like, found))


@torch.no_grad()
def fill(file: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Copy all tensors into those of the same names; CheckpointError, before any copy: they differ in more."""
    _require_same_names(file, found, wanted)
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise CheckpointError(
                f"{file} belongs to another model: its {name} has shape {list(found[name].shape)} "
                f"instead of {list(tensor.shape)}"
            )
        if tensor.is_floating_point() != found[name].is_floating_point():
            raise CheckpointError(f"{file} is damaged: its {name} is {found[name].dtype}, and not {tensor.dtype}")
    for name, tensor in wanted.items():
        assign(tensor, found[name])


def _require_same_model(file: Path, metadata: Mapping[str, str], config: ModelConfig) -> list[str]:
    """Differing implementation fields, one phrase per field; a model of another function is refused."""
    written = metadata.get("seqmix.model")
    if written is None:
        return []
    what, how = _split(config)
    try:
        what_before, how_before = _split(ModelConfig.model_validate(json.loads(written)))
    except (ValueError, RecursionError):
        what_before, how_before = None, {}
    if what != what_before:
        raise CheckpointError(
            f"{file} does not match the model of the configuration: undo the changes in config.yaml under `model`, "
            f"other than {', '.join(IMPLEMENTATION_FIELDS)} of mixers"
        )
    changed = (name for name in how if how[name] != how_before[name])
    return [f"{name} {how_before[name]} before and {how[name]} from here on" for name in changed]


def _split(config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that define a model's function, and its implementation fields by dotted name."""
    what = config.model_dump(mode="json")
    how = {
        f"model.blocks.{name}.mixer.{field}": block["mixer"].pop(field)
        for name, block in what["blocks"].items()
        for field in IMPLEMENTATION_FIELDS
        if field in block["mixer"]
    }
    return what, how


def _require_same_names(file: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    lacking, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    for names, sentence in ((lacking, "it lacks {}"), (extra, "it has an additional {}")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"{file} belongs to another model: {sentence.format(min(names))}{more}")
