"""The training state as named tensors: parameters, optimizer state, moving average, and carried recurrent state."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...mixers.base.contract import IMPLEMENTATION_FIELDS
from ...mixers.base.state import from_dict, map_state, to_dict
from ...models import TOKENIZER_FILE, LanguageModel, ModelConfig, ModelState, Tokenizer
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
"""Names of the parts of a checkpoint."""
MAX_COUNT = 2**53
"""Exclusive upper bound of token counts in a state; float64 represents smaller integers exactly."""
TOKENIZER_KEY = "seqmix.tokenizer_sha256"
"""Key in the metadata of a checkpoint's files; absent without a tokenizer.json, and in those of older versions."""


def local_parts(
    model: LanguageModel,
    optimizer: AnyOptimizer,
    state: ModelState | None = None,
    ema: Ema | None = None,
    groups: ProcessGroups = ALONE,
) -> Parts:
    """Return the chunks that this process writes to a checkpoint, by part and name; they are views, not copies.

    Every chunk is written by exactly one process.
    """
    parts = {MODEL: parameters_of(model), OPTIMIZER: moments_of(model, optimizer)}
    if ema is not None:
        parts[EMA] = parameters_of(model) | ema.parameters
    chunks = {part: _local_chunks(tensors, groups) for part, tensors in parts.items()}
    if state is not None:
        writes_state = groups.rank % groups.context_parallel == 0  # ranks that share sequences have the same state
        chunks[STATE] = {name: rows_of(leaf, groups) for name, leaf in to_dict(state).items() if writes_state}
    return chunks


def _local_chunks(tensors: Mapping[str, Tensor], groups: ProcessGroups) -> dict[str, Chunk]:
    """Return the chunks that this process writes.

    The replicas divide the sharded tensors among them; the main process writes all others.
    """
    chunks = {
        name: chunk_of(tensor.detach())
        for number, (name, tensor) in enumerate(tensors.items())
        if (number % groups.data == groups.replica if is_sharded(tensor) else groups.is_main)
    }
    return {name: chunk for name, chunk in chunks.items() if chunk.values.numel() or groups.size == 1}


def rows_of(leaf: Tensor, groups: ProcessGroups) -> Chunk:
    """Return a leaf of a state as a chunk: this process's rows of the whole batch."""
    rows = leaf.shape[0]
    rest = leaf.shape[1:]
    return Chunk(leaf, (groups.dp_rank * rows, *(0 for _ in rest)), (groups.dp_size * rows, *rest))


def parameters_of(model: LanguageModel) -> dict[str, Tensor]:
    """Return the parameters by name, tied ones once, and the persistent buffers."""
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | buffers


def moments_of(model: LanguageModel, optimizer: AnyOptimizer) -> dict[str, Tensor]:
    """Return the optimizer state by name, such as "exp_avg.blocks.0.mixer.out_proj.weight"."""
    return {
        f"{key}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor | int | float)
    }


def metadata_of(config: ModelConfig, step: int, vocabulary: bytes | None = None) -> dict[str, str]:
    """Return the metadata of a checkpoint's files: the step, the model's configuration, the SHA-256 of its tokenizer.

    Args:
        config: the model's configuration.
        step: number of steps completed.
        vocabulary: content of the tokenizer.json; None without one.
    """
    metadata = {"seqmix.step": str(step), "seqmix.model": config.model_dump_json()}
    return metadata if vocabulary is None else metadata | {TOKENIZER_KEY: hashlib.sha256(vocabulary).hexdigest()}


def load_model(folder: Path, model: LanguageModel, part: str = MODEL) -> list[str]:
    """Load a checkpoint's parameters into a model.

    Args:
        folder: the checkpoint.
        model: the model.
        part: `EMA` to load the moving average instead.

    Returns:
        One phrase per implementation field (`chunk_size`, ...) that differs from training, which changes rounding.

    Raises:
        CheckpointError: the parameters are missing, damaged, or of another model or tokenizer.
    """
    files = files_of(folder, part)
    metadata = read_chunks(files)[1]
    require_same_tokenizer(files[0], metadata, model.tokenizer)
    changed = _require_same_model(files[0], metadata, model.config)
    fill(files, chunks_of(parameters_of(model)))
    return changed


def load_optimizer(folder: Path, model: LanguageModel, optimizer: AnyOptimizer) -> None:
    """Load a checkpoint's optimizer state.

    Raises:
        CheckpointError: the state is missing, damaged, or of another model.
    """
    files = files_of(folder, OPTIMIZER)
    names = {key.partition(".")[2] for key in read_chunks(files)[0]}  # of "exp_avg.norm.weight": "norm.weight"
    start_moments([parameter for name, parameter in model.named_parameters() if name in names], optimizer)
    moments = moments_of(model, optimizer)
    fill(files, chunks_of(moments))
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        numbers = {key: value for key, value in state.items() if isinstance(value, int | float)}
        state |= {key: type(value)(moments[f"{key}.{name}"].item()) for key, value in numbers.items()}


def load_ema(folder: Path, model: LanguageModel, ema: Ema) -> None:
    """Load a checkpoint's moving average; if it has none, restart the average from the current parameters."""
    if (files := files_of(folder, EMA))[0].exists():
        fill(files, chunks_of(parameters_of(model) | ema.parameters))
    else:
        ema.parameters = Ema(model, ema.decay).parameters


def load_state(folder: Path, model: LanguageModel, batch_size: int, groups: ProcessGroups = ALONE) -> ModelState:
    """Load this process's rows of a checkpoint's recurrent state.

    Args:
        folder: the checkpoint.
        model: the model.
        batch_size: rows of the whole batch.
        groups: the processes.

    Raises:
        CheckpointError: the state is missing, damaged, or of another model or batch size.
    """
    files = files_of(folder, STATE)
    rows = batch_size // groups.dp_size
    chunks = read_chunks(files)[0]
    template = model.init_state(rows)
    leaves = to_dict(template)
    require_same_names(files, chunks, leaves)
    if any(first.shape[:1] != (batch_size,) for first, *_ in chunks.values()):
        sizes = sorted({first.shape[0] for first, *_ in chunks.values() if first.shape})
        raise CheckpointError(
            f"{files[0]} needs training.batch_size = {' or '.join(map(str, sizes))}, got {batch_size}: set it "
            "back to resume"
        )
    for name, (first, *_) in chunks.items():
        _require_leaf(files[0], name, first, leaves[name])
    # keeps the floating-point dtypes of the file, which may be narrower than the model's
    state = {name: first.values.new_empty(rows, *first.shape[1:]) for name, (first, *_) in chunks.items()}
    fill(files, {name: rows_of(leaf, groups) for name, leaf in state.items()})
    return map_state(lambda leaf: leaf.to(model.device), from_dict(template, state))


def _require_leaf(file: Path, name: str, saved: Chunk, leaf: Tensor) -> None:
    """Check that a saved leaf of a recurrent state fits the model.

    It must have the model's shape and dtype; instead of a floating-point dtype, any other one is allowed. Integer
    leaves count tokens, and must be within 0 to MAX_COUNT - 1.

    Raises:
        CheckpointError: the leaf does not fit.
    """
    dtype = saved.values.dtype
    expected = leaf.dtype
    is_compatible = dtype == expected or (dtype.is_floating_point and expected.is_floating_point)
    if saved.shape[1:] != leaf.shape[1:] or not is_compatible:
        shape = ", ".join(["rows", *map(str, leaf.shape[1:])])
        raise CheckpointError(
            f"{file} does not fit the model: expected {name} to be {expected} [{shape}], got {dtype} "
            f"{list(saved.shape)}; resume from another checkpoint"
        )
    if not dtype.is_floating_point and bool(((saved.values < 0) | (saved.values >= MAX_COUNT)).any()):
        raise CheckpointError(
            f"{file} does not fit the model: expected {name} to count tokens, from 0 to {MAX_COUNT - 1:,}, got "
            f"{saved.values.min().item():,} to {saved.values.max().item():,}; resume from another checkpoint"
        )


def chunks_of(tensors: Mapping[str, Tensor]) -> dict[str, Chunk]:
    """Return this process's chunk of each tensor; sharded tensors have one per process."""
    return {name: chunk_of(tensor) for name, tensor in tensors.items()}


def require_same_tokenizer(file: Path, metadata: Mapping[str, str], tokenizer: Tokenizer | None) -> None:
    """Check that a checkpoint was trained with this tokenizer, if its metadata says with which one.

    Raises:
        CheckpointError: the tokenizer.json has other contents.
    """
    if tokenizer is None or tokenizer.vocabulary is None or TOKENIZER_KEY not in metadata:
        return
    expected, sha256 = metadata[TOKENIZER_KEY], hashlib.sha256(tokenizer.vocabulary).hexdigest()
    if sha256 != expected:
        raise CheckpointError(
            f"{file} was trained with another tokenizer: expected a {TOKENIZER_FILE} with SHA-256 {expected}, got "
            f"{sha256}; put the file of the training back"
        )


def _require_same_model(file: Path, metadata: Mapping[str, str], config: ModelConfig) -> list[str]:
    """Check that a checkpoint is of the configured model; return one phrase per implementation field that differs.

    Raises:
        CheckpointError: another field of the model differs.
    """
    saved_json = metadata.get("seqmix.model")
    if saved_json is None:
        return []
    function, implementation = _split_fields(config)
    saved_function = None
    saved_implementation = {}
    with suppress(ValueError, RecursionError):
        fields = json.loads(saved_json)
        if not unimported(fields):  # the configured model's modules are imported by now: others are not its own
            saved_function, saved_implementation = _split_fields(ModelConfig.model_validate(fields))
    if function != saved_function:
        raise CheckpointError(
            f"{file} does not match the model of the configuration: undo the changes under `model` in config.yaml; "
            f"only the mixers' fields {', '.join(IMPLEMENTATION_FIELDS)} may differ"
        )
    changed = (name for name in implementation if implementation[name] != saved_implementation[name])
    return [f"{name} {saved_implementation[name]} before and {implementation[name]} from here on" for name in changed]


def _split_fields(config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields that define a model's function, and its implementation fields by dotted name."""
    function = config.model_dump(mode="json")
    implementation = {
        f"model.blocks.{name}.mixer.{field}": block["mixer"].pop(field)
        for name, block in function["blocks"].items()
        for field in IMPLEMENTATION_FIELDS
        if field in block["mixer"]
    }
    return function, implementation
