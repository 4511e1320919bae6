"""The training state as named tensors: parameters, optimizer state, and the carried recurrent state."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...mixers.contract import IMPLEMENTATION_FIELDS
from ...mixers.state import from_dict, map_state, to_dict
from ...models import LanguageModel, ModelConfig, ModelState
from ...registry import unimported
from ..distributed.process_groups import ALONE, ProcessGroups
from ..distributed.sharding import chunk_of, is_sharded
from ..ema import Ema
from ..optimizer import AnyOptimizer, start_moments
from ..tensor_files import Chunk, fill, read_chunks, require_same_names
from .files import CheckpointError, Parts, files_of

MODEL = "model"
OPTIMIZER = "optimizer"
STATE = "state"
EMA = "ema"
"""The parts of a checkpoint."""
LONGEST = 2**53
"""Tokens that a state counts are below it: float64 has them exactly."""


def own_parts(
    model: LanguageModel,
    optimizer: AnyOptimizer,
    state: ModelState | None = None,
    ema: Ema | None = None,
    groups: ProcessGroups = ALONE,
) -> Parts:
    """What this process has to write of a checkpoint, by part and name, each chunk on one process; not copies."""
    parts = {MODEL: parameters_of(model), OPTIMIZER: moments_of(model, optimizer)}
    if ema is not None:
        parts[EMA] = parameters_of(model) | ema.parameters
    own = {part: _own(tensors, groups) for part, tensors in parts.items()}
    if state is not None:
        first = groups.rank % groups.context_parallel == 0  # all ranks that share sequences have the same state
        own[STATE] = {name: rows_of(leaf, groups) for name, leaf in to_dict(state).items() if first}
    return own


def _own(tensors: Mapping[str, Tensor], groups: ProcessGroups) -> dict[str, Chunk]:
    """The chunks that this process has to write: replicas share the sharded tensors, the first writes all others."""
    mine = {
        name: chunk_of(tensor.detach())
        for number, (name, tensor) in enumerate(tensors.items())
        if (number % groups.data == groups.replica if is_sharded(tensor) else groups.is_main)
    }
    return {name: chunk for name, chunk in mine.items() if chunk.values.numel() or groups.size == 1}


def rows_of(leaf: Tensor, groups: ProcessGroups) -> Chunk:
    """A state's leaf as this process's rows of the global batch."""
    rows = leaf.shape[0]
    rest = leaf.shape[1:]
    return Chunk(leaf, (groups.dp_rank * rows, *(0 for _ in rest)), (groups.dp_size * rows, *rest))


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
    files = files_of(folder, part)
    changed = _require_same_model(files[0], read_chunks(files)[1], model.config)
    fill(files, chunks_of(parameters_of(model)))
    return changed


def load_optimizer(folder: Path, model: LanguageModel, optimizer: AnyOptimizer) -> None:
    """Load a checkpoint's optimizer state; CheckpointError: it is missing, damaged, or another model's."""
    files = files_of(folder, OPTIMIZER)
    found = read_chunks(files)[0]
    saved = [p for name, p in model.named_parameters() if any(key.endswith(f".{name}") for key in found)]
    start_moments(saved, optimizer)
    moments = moments_of(model, optimizer)
    fill(files, chunks_of(moments))
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        numbers = {key: value for key, value in state.items() if isinstance(value, int | float)}
        state |= {key: type(value)(moments[f"{key}.{name}"].item()) for key, value in numbers.items()}


def load_ema(folder: Path, model: LanguageModel, ema: Ema) -> None:
    """Load a checkpoint's moving average of the parameters, or begin one with them where it has none."""
    if (files := files_of(folder, EMA))[0].exists():
        fill(files, chunks_of(parameters_of(model) | ema.parameters))
    else:
        ema.parameters = Ema(model, ema.decay).parameters


def load_state(folder: Path, model: LanguageModel, batch_size: int, groups: ProcessGroups = ALONE) -> ModelState:
    """This process's rows of the recurrent state of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or of another model or batch.
    """
    files = files_of(folder, STATE)
    rows = batch_size // groups.dp_size
    found = read_chunks(files)[0]
    like = model.init_state(rows)
    leaves = to_dict(like)
    require_same_names(files, found, leaves)
    if any(first.shape[:1] != (batch_size,) for first, *_ in found.values()):
        raise CheckpointError(f"{files[0]} has a state of another batch size than training.batch_size = {batch_size}")
    for name, (first, *_) in found.items():
        _require_leaf(files[0], name, first, leaves[name])
    # the floating-point dtypes are those of the run
    state = {name: first.values.new_empty(rows, *first.shape[1:]) for name, (first, *_) in found.items()}
    fill(files, {name: rows_of(leaf, groups) for name, leaf in state.items()})
    return map_state(lambda leaf: leaf.to(model.device), from_dict(like, state))


def _require_leaf(file: Path, name: str, found: Chunk, leaf: Tensor) -> None:
    """Refuse a tensor of a state that has another shape or type than the model's; floats may be of any precision.

    Raises:
        CheckpointError: it has.
    """
    dtype = found.values.dtype
    expected = leaf.dtype
    alike = dtype == expected or (dtype.is_floating_point and expected.is_floating_point)
    if found.shape[1:] != leaf.shape[1:] or not alike:
        shape = ", ".join(["rows", *map(str, leaf.shape[1:])])
        raise CheckpointError(
            f"{file} does not fit the model: expected {name} to be {expected} [{shape}], got {dtype} "
            f"{list(found.shape)}; go on from another checkpoint"
        )
    if not dtype.is_floating_point and bool(((found.values < 0) | (found.values >= LONGEST)).any()):
        raise CheckpointError(
            f"{file} does not fit the model: expected {name} to count tokens, 0 to {LONGEST - 1:,}, got "
            f"{found.values.min().item():,} to {found.values.max().item():,}; go on from another checkpoint"
        )


def chunks_of(tensors: Mapping[str, Tensor]) -> dict[str, Chunk]:
    """What this process has of tensors, which may be sharded."""
    return {name: chunk_of(tensor) for name, tensor in tensors.items()}


def _require_same_model(file: Path, metadata: Mapping[str, str], config: ModelConfig) -> list[str]:
    """Differing implementation fields, one phrase per field; a model of another function is refused."""
    written = metadata.get("seqmix.model")
    if written is None:
        return []
    what, how = _split(config)
    what_before = None
    how_before = {}
    with suppress(ValueError, RecursionError):
        fields = json.loads(written)
        if not unimported(fields):  # the run's own model is built by now, so another one names other code
            what_before, how_before = _split(ModelConfig.model_validate(fields))
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
