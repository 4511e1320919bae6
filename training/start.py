"""What a run starts from (training.start_from): the model, the tokenizer and the weights of a folder.

It is a run directory (`seqmix convert` writes one too), a file of `seqmix export`, or a folder of `seqmix.hf`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..configs import PRESETS
from ..mixers.contract import IMPLEMENTATION_FIELDS
from ..models import TOKENIZER_FILE, ByteTokenizer, LanguageModel, ModelConfig, Tokenizer, load_tokenizer
from ..models.subword import EXPORTED_TOKENIZER
from ..registry import load, nearest, read_bytes, require_trusted, validated
from ..registry.tree import Node, Origin
from .checkpoint.errors import TrainingError
from .checkpoint.run_dir import CONFIG_FILE
from .checkpoint.saved_run import EXPORTED_CONFIG, read_config, read_weights
from .checkpoint.train_state import parameters_of
from .config import RunConfig
from .distributed.sharding import assign
from .tensor_files import read_tensors

HF_CONFIG = "config.json"
HF_TOKENIZER_CONFIG = "tokenizer_config.json"


class Described(NamedTuple):
    """A folder's model and tokenizer; its weights are not read."""

    model: Mapping[str, Any]
    """The fields of its `model`."""
    tokenizer: str | None
    """As `data.tokenizer` names it; None where its tokens are not text."""
    begin: str | None = None
    """As `data.begin_token`."""


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the configuration of a run.

    With training.start_from, `model` may be left out (or null), and so may the tokenizer of a text: they are then those
    of that folder.

    Args:
        source: the name of a preset, or a YAML file.
        overrides: changes (or one) as "dotted.path=value", the value in YAML.

    Raises:
        ConfigError: where the configuration is wrong, and what is allowed.
        SeqmixError: the folder of training.start_from has no model that can be read.
    """
    changes = [overrides] if isinstance(overrides, str) else overrides
    return load(RunConfig, source, changes, presets=PRESETS, complete=_complete)


class Beginning(NamedTuple):
    """Where the first parameters came from."""

    note: str
    provenance: dict[str, str]


def start_from(folder: Path, model: LanguageModel, tokenizer: Tokenizer | None) -> Beginning:
    """Copy a folder's weights (of training.start_from) into a model of the same names and shapes; other fields may
    differ, and a note says so. `tokenizer` is that of the text the model is going to read.

    Raises:
        SeqmixError: the folder cannot be read, or its model or tokenizer is another one.
    """
    described = describe(folder)
    _require_same_tokenizer(folder, described, tokenizer)
    config, found = _weights(folder, described)
    wanted = parameters_of(model)
    if differences := list(_differences(found, wanted)):
        raise TrainingError(f"training.start_from = {folder} has another model: {'; '.join(differences)}")
    digest = hashlib.sha256()
    for name, tensor in sorted(found.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        assign(wanted[name], tensor)
    changed = [f"{name} was {before} there and is {now} here" for name, before, now in _changes(config, model.config)]
    note = f"started from the weights of {folder}{': ' if changed else ''}{'; '.join(changed)}"
    return Beginning(note, {"folder": str(folder.absolute()), "sha256": digest.hexdigest()})


def describe(folder: Path) -> Described:
    """What a folder or file of trained weights says of itself.

    Raises:
        SeqmixError: it is none, cannot be read, or names code that is not imported yet.
    """
    if (folder / CONFIG_FILE).is_file():
        config = read_config(folder)
        if not config.data.is_text:
            return Described(config.model.model_dump(mode="json"), None)
        copy = folder / TOKENIZER_FILE
        data = config.data.model_dump(include={"tokenizer", "begin_token"})
        tokenizer = str(copy) if copy.is_file() else data["tokenizer"]
        return Described(config.model.model_dump(mode="json"), tokenizer, data["begin_token"])
    try:
        described = _exported(folder) if folder.is_file() else _of_hugging_face(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        allowed = "it is a run directory, a file of `seqmix export`, or a folder of seqmix.hf"
        if not folder.exists():
            beside = [other.name for other in folder.absolute().parent.glob("*")]
            found = nearest(folder.name, beside)
            raise TrainingError(f"training.start_from = {folder} does not exist: {allowed}{found}") from error
        why = "it has no config.json" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise TrainingError(
            f"training.start_from = {folder} cannot be read: {allowed} ({why or type(error).__name__})"
        ) from error
    require_trusted(described.model, f"training.start_from = {folder}", "write its `model` into your configuration")
    return described


def _exported(file: Path) -> Described:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    whole = json.loads(metadata[EXPORTED_CONFIG])
    if EXPORTED_TOKENIZER in metadata:
        return Described(whole["model"], str(file), whole["data"].get("begin_token"))
    is_text = whole["data"].get("kind", "text") == "text"
    return Described(whole["model"], ByteTokenizer.identity if is_text else None)


def _of_hugging_face(folder: Path) -> Described:
    config = json.loads(read_bytes(folder / HF_CONFIG))
    if "model" not in config:
        raise ValueError(f"its {HF_CONFIG} is of another library: `seqmix convert` makes a run directory of it")
    model = config["model"]
    if not (folder / TOKENIZER_FILE).is_file():
        return Described(dict(model), None)
    parts = json.loads(read_bytes(folder / TOKENIZER_FILE))["model"]
    if len(parts["vocab"]) == ByteTokenizer.vocab_size - 1 and not parts.get("merges"):
        return Described(dict(model), ByteTokenizer.identity)
    begin = json.loads(read_bytes(folder / HF_TOKENIZER_CONFIG))["bos_token"]
    return Described(dict(model), str(folder / TOKENIZER_FILE), begin if isinstance(begin, str) else begin["content"])


def _complete(tree: Node) -> Node:
    """A configuration with the model and the tokenizer of what it starts from, where it has none of its own."""
    training = tree.child("training")
    model = tree.child("model")
    data = tree.child("data")
    given = training and training.child("start_from")
    if given is None or not isinstance(given.value, str):
        return tree
    kind = data and data.child("kind")
    without_tokenizer = (kind is None or kind.value == "text") and (data is None or data.child("tokenizer") is None)
    without_model = model is None or model.value is None
    if not (without_model or without_tokenizer):
        return tree
    described = describe(Path(given.value))
    taken = {}
    if without_model:
        taken["model"] = described.model
    if without_tokenizer and described.tokenizer is not None:
        taken["data"] = {"tokenizer": described.tokenizer, "begin_token": described.begin}
    return tree.merge(Node.of(taken, Origin(given.value)))


def _weights(folder: Path, described: Described) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """The model that was trained, and its tensors."""
    if folder.is_file() or (folder / CONFIG_FILE).is_file():
        config, found, _ = read_weights(folder)
        return config, found
    config = validated(ModelConfig, described.model, str(folder / HF_CONFIG))
    files = sorted(folder.glob("*.safetensors"))
    found = {name.removeprefix("model."): x for file in files for name, x in read_tensors([file])[0].items()}
    return config, found


def _differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Iterator[str]:
    """A phrase for each way in which tensors differ by name or shape."""
    for phrase, names in (
        ("it lacks {}", wanted.keys() - found.keys()),
        ("it has an additional {}", found.keys() - wanted.keys()),
    ):
        if names:
            yield phrase.format(min(names)) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
    shared = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    if shared:
        first = shared[0]
        yield (
            f"its {first} has shape {list(found[first].shape)} instead of {list(wanted[first].shape)}"
            f"{f' (and {len(shared) - 1} more)' if len(shared) > 1 else ''}"
        )


def _changes(before: ModelConfig, now: ModelConfig) -> list[tuple[str, Any, Any]]:
    """Fields of two models with the same tensors that differ, by dotted name, layer by layer."""
    found: dict[str, tuple[Any, Any]] = {}
    parts = [("model", *(m.model_dump(mode="json", exclude={"blocks", "pattern", "init"}) for m in (before, now)))]
    for one, other in zip(before.layers, now.layers, strict=True):
        blocks = (before.blocks[one].model_dump(mode="json"), now.blocks[other].model_dump(mode="json"))
        parts.append((f"model.blocks.{other}", *blocks))
    for name, *fields in parts:
        was, is_now = (dict(_flat(name, each)) for each in fields)
        found |= {key: (was.get(key), is_now.get(key)) for key in was | is_now if was.get(key) != is_now.get(key)}
    skipped = tuple(f".{field}" for field in (*IMPLEMENTATION_FIELDS, "dropout"))
    return [(key, *values) for key, values in found.items() if not key.endswith(skipped)]


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The scalars and lists of nested fields, by dotted name."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _flat(f"{name}.{key}", entry)
    else:
        yield name, value


def _require_same_tokenizer(folder: Path, described: Described, tokenizer: Tokenizer | None) -> None:
    """Refuse another map of text to tokens than the one that the weights were trained with."""
    if described.tokenizer is None or tokenizer is None:
        return
    theirs = load_tokenizer(described.tokenizer, described.begin)
    if tokenizer.identity == theirs.identity or _map(tokenizer) == _map(theirs):
        return
    raise TrainingError(
        f"training.start_from = {folder} was trained with another tokenizer than data.tokenizer: leave out "
        "data.tokenizer and data.begin_token to take the folder's"
    )


def _map(tokenizer: Tokenizer) -> Any:
    """What a tokenizer does, however its file is written: its parts without the begin token."""
    if tokenizer.vocabulary is None:
        return tokenizer.identity
    parts = json.loads(import_module("tokenizers").Tokenizer.from_buffer(tokenizer.vocabulary).to_str())
    words = parts["model"].get("vocab")
    if isinstance(words, dict):
        parts["model"]["vocab"] = {word: number for word, number in words.items() if number != tokenizer.begin}
    added = [token for token in parts["added_tokens"] if token["id"] != tokenizer.begin]
    return tokenizer.begin, added, *(parts[name] for name in ("model", "normalizer", "pre_tokenizer"))
