"""Starting a run from existing weights (training.start_from): their model, tokenizer and tensors.

The source is a run directory (`seqmix convert` writes one too), a file of `seqmix export`, or a Hugging Face folder.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..configs import PRESETS
from ..mixers.base.contract import IMPLEMENTATION_FIELDS
from ..models import TOKENIZER_FILE, ByteTokenizer, LanguageModel, ModelConfig, Tokenizer, load_tokenizer
from ..models.subword import EXPORTED_TOKENIZER, have_same_tokens
from ..registry import load, nearest_hint, read_bytes, require_trusted, validated
from ..registry.tree import Node, Origin
from .checkpoint.errors import RunFileError, TrainingError
from .checkpoint.run_dir import CONFIG_FILE
from .checkpoint.saved_run import EXPORTED_CONFIG, read_config, read_weights
from .checkpoint.train_state import parameters_of
from .config import RunConfig
from .distributed.sharding import assign
from .tensor_files import read_tensors, verify_seal

HF_CONFIG = "config.json"
HF_TOKENIZER_CONFIG = "tokenizer_config.json"


class SourceModel(NamedTuple):
    """Model and tokenizer of a source of weights; the weights themselves are not read."""

    model: Mapping[str, Any]
    """Fields of the model's configuration."""
    tokenizer: str | None
    """Tokenizer, as a value of `data.tokenizer`; None if its tokens are not text."""
    begin: str | None = None
    """Begin token, as a value of `data.begin_token`; None if the source names none."""


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the configuration of a run.

    With training.start_from, `model` (or the tokenizer of a text) may be missing or null: it is then taken from the
    source of the weights.

    Args:
        source: the name of a preset, or a YAML file.
        overrides: one change or several, each "dotted.path=value" with the value in YAML.

    Raises:
        ConfigError: the configuration is invalid; the message says where, and what is allowed.
        SeqmixError: the model of training.start_from cannot be read.
    """
    changes = [overrides] if isinstance(overrides, str) else overrides
    return load(RunConfig, source, changes, presets=PRESETS, complete=_complete)


class WeightsOrigin(NamedTuple):
    """Origin of the initial parameters, as returned by `start_from`."""

    note: str
    """One sentence for the user, with the source of the weights and the changed fields of the model."""
    provenance: dict[str, str]
    """Folder of the weights, and the SHA-256 of their names and values."""


def start_from(folder: Path, model: LanguageModel, tokenizer: Tokenizer | None) -> WeightsOrigin:
    """Copy the weights of training.start_from into a model whose tensors have the same names and shapes.

    Other fields of the model may differ; the returned note lists them.

    Args:
        folder: the source of the weights: a run directory, an exported file, or a folder for Hugging Face.
        model: the model to fill.
        tokenizer: the tokenizer of the training data; None if its tokens are not text.

    Raises:
        SeqmixError: the weights cannot be read, or belong to another model or tokenizer.
    """
    source = describe(folder)
    _require_same_tokenizer(folder, source, tokenizer)
    config, loaded = _read_source(folder, source)
    parameters = parameters_of(model)
    if differences := list(_tensor_differences(loaded, parameters)):
        raise TrainingError(
            f"the weights of training.start_from = {folder} do not fit the configured model: {'; '.join(differences)}"
        )
    digest = hashlib.sha256()
    for name, tensor in sorted(loaded.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        assign(parameters[name], tensor)
    changed = [
        f"{name} was {before} for these weights and is {now} here"
        for name, before, now in _field_changes(config, model.config)
    ]
    note = f"started from the weights of {folder}{': ' if changed else ''}{'; '.join(changed)}"
    return WeightsOrigin(note, {"folder": str(folder.absolute()), "sha256": digest.hexdigest()})


def describe(folder: Path) -> SourceModel:
    """Read the model and the tokenizer of a folder or file of trained weights, without the weights.

    Raises:
        SeqmixError: it does not exist, cannot be read, is of another kind, or names code that is not imported yet.
    """
    if (folder / CONFIG_FILE).is_file():
        config = read_config(folder)
        if not config.data.is_text:
            return SourceModel(config.model.model_dump(mode="json"), None)
        copy = folder / TOKENIZER_FILE
        data = config.data.model_dump(include={"tokenizer", "begin_token"})
        tokenizer = str(copy) if copy.is_file() else data["tokenizer"]
        return SourceModel(config.model.model_dump(mode="json"), tokenizer, data["begin_token"])
    try:
        source = _describe_export(folder) if folder.is_file() else _describe_hugging_face(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        allowed = "expected a run directory, a file of `seqmix export`, or a folder of `seqmix export --to hf`"
        if not folder.exists():
            siblings = [other.name for other in folder.absolute().parent.glob("*")]
            suggestion = nearest_hint(folder.name, siblings)
            raise RunFileError(f"training.start_from = {folder} does not exist: {allowed}{suggestion}") from error
        reason = "it has no config.json" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise RunFileError(
            f"training.start_from = {folder} cannot be read: {allowed} ({reason or type(error).__name__})"
        ) from error
    require_trusted(source.model, f"training.start_from = {folder}", "write its `model` into your configuration")
    return source


def _describe_export(file: Path) -> SourceModel:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    config = json.loads(metadata[EXPORTED_CONFIG])
    if EXPORTED_TOKENIZER in metadata:
        return SourceModel(config["model"], str(file), config["data"].get("begin_token"))
    is_text = config["data"].get("kind", "text") == "text"
    return SourceModel(config["model"], ByteTokenizer.identity if is_text else None)


def _describe_hugging_face(folder: Path) -> SourceModel:
    config = json.loads(read_bytes(folder / HF_CONFIG))
    if "model" not in config:
        raise ValueError(f"its {HF_CONFIG} is of another library: convert it to a run directory with `seqmix convert`")
    model = config["model"]
    if not (folder / TOKENIZER_FILE).is_file():
        return SourceModel(dict(model), None)
    parts = json.loads(read_bytes(folder / TOKENIZER_FILE))["model"]
    if len(parts["vocab"]) == ByteTokenizer.vocab_size - 1 and not parts.get("merges"):
        return SourceModel(dict(model), ByteTokenizer.identity)
    begin = json.loads(read_bytes(folder / HF_TOKENIZER_CONFIG))["bos_token"]
    return SourceModel(dict(model), str(folder / TOKENIZER_FILE), begin if isinstance(begin, str) else begin["content"])


def _complete(tree: Node) -> Node:
    """Fill in the model and the tokenizer from training.start_from, if a configuration lacks them."""
    training = tree.child("training")
    model = tree.child("model")
    data = tree.child("data")
    path = training and training.child("start_from")
    if path is None or not isinstance(path.value, str):
        return tree
    kind = data and data.child("kind")
    lacks_tokenizer = (kind is None or kind.value == "text") and (data is None or data.child("tokenizer") is None)
    lacks_model = model is None or model.value is None
    if not (lacks_model or lacks_tokenizer):
        return tree
    source = describe(Path(path.value))
    added = {}
    if lacks_model:
        added["model"] = source.model
    if lacks_tokenizer and source.tokenizer is not None:
        added["data"] = {"tokenizer": source.tokenizer, "begin_token": source.begin}
    return tree.merge(Node.of(added, Origin(path.value)))


def _read_source(folder: Path, source: SourceModel) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """Read the configuration of a trained model, and its tensors."""
    if folder.is_file() or (folder / CONFIG_FILE).is_file():
        config, tensors, _ = read_weights(folder)
        return config, tensors
    config = validated(ModelConfig, source.model, str(folder / HF_CONFIG))
    files = sorted(folder.glob("*.safetensors"))
    weights: dict[str, Tensor] = {}
    for file in files:
        tensors, metadata = read_tensors([file])
        verify_seal(file, tensors, metadata)
        weights |= {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return config, weights


def _tensor_differences(loaded: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Iterator[str]:
    """Describe how loaded tensors differ from a model's by name or shape: one phrase per kind of difference."""
    for phrase, names in (
        ("they lack {}", parameters.keys() - loaded.keys()),
        ("they have an additional {}", loaded.keys() - parameters.keys()),
    ):
        if names:
            yield phrase.format(min(names)) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
    reshaped = [name for name in parameters if name in loaded and loaded[name].shape != parameters[name].shape]
    if reshaped:
        first = reshaped[0]
        yield (
            f"their {first} has shape {list(loaded[first].shape)} instead of {list(parameters[first].shape)}"
            f"{f' (and {len(reshaped) - 1} more)' if len(reshaped) > 1 else ''}"
        )


def _field_changes(before: ModelConfig, now: ModelConfig) -> list[tuple[str, Any, Any]]:
    """Return the differing fields of two models with the same tensors: dotted name, old value, new value.

    Blocks are compared layer by layer. Implementation fields and dropout are left out.
    """
    changes: dict[str, tuple[Any, Any]] = {}
    parts = [("model", *(m.model_dump(mode="json", exclude={"blocks", "pattern", "init"}) for m in (before, now)))]
    for old_block, new_block in zip(before.layers, now.layers, strict=True):
        blocks = (before.blocks[old_block].model_dump(mode="json"), now.blocks[new_block].model_dump(mode="json"))
        parts.append((f"model.blocks.{new_block}", *blocks))
    for name, *fields in parts:
        old, new = (dict(_flatten(name, each)) for each in fields)
        changes |= {key: (old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)}
    skipped = tuple(f".{field}" for field in (*IMPLEMENTATION_FIELDS, "dropout"))
    return [(key, *values) for key, values in changes.items() if not key.endswith(skipped)]


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the scalars and lists of nested fields, by dotted name."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _flatten(f"{name}.{key}", entry)
    else:
        yield name, value


def _require_same_tokenizer(folder: Path, source: SourceModel, tokenizer: Tokenizer | None) -> None:
    """Raise TrainingError if a tokenizer maps text to other tokens than the one that the weights were trained with."""
    if source.tokenizer is None or tokenizer is None:
        return
    theirs = load_tokenizer(source.tokenizer, source.begin)
    if have_same_tokens(tokenizer, theirs):
        return
    raise TrainingError(
        f"training.start_from = {folder} was trained with another tokenizer than data.tokenizer: leave out "
        "data.tokenizer and data.begin_token to use the one that it was trained with"
    )
