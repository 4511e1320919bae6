"""Folders of other libraries' models on disk, and run directories of converted ones."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from ..models import TOKENIZER_FILE, LanguageModel, ModelConfig, SubwordTokenizer
from ..registry import SeqmixError, replacing_folder, write_file
from ..training import RunConfig
from ..training.checkpoint import saved_run
from ..training.checkpoint.run_dir import require_vacant
from ..training.tensor_files import read_tensors, write_tensors

CONFIGS = ("config.json", "args.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFETENSORS = "model.safetensors"
COMMENT = "# Converted by `seqmix convert`; data and training are placeholders until you set them.\n"


def read_config(source: Path) -> dict[str, Any]:
    """The configuration of a folder.

    Raises:
        SeqmixError: there is none, or it cannot be read.
    """
    require_no_pickle(source)
    file = next((source / name for name in CONFIGS if (source / name).is_file()), None)
    if file is None:
        what = "does not exist" if not source.exists() else "is a file" if source.is_file() else "has no config.json"
        raise SeqmixError(
            f"{source} is neither a model's folder (config.json and *.safetensors) nor a run or export of seqmix: "
            f"it {what}"
        )
    try:
        # transformers writes what JSON lacks as {"__float__": "Infinity"}
        found = json.loads(file.read_bytes(), object_hook=lambda x: math.inf if x == INFINITY else x)
    except (OSError, ValueError, RecursionError) as error:
        raise SeqmixError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise SeqmixError(f"{file} is not a configuration: it has no fields")
    return found


INFINITY = {"__float__": "Infinity"}


def require_no_pickle(source: Path) -> None:
    """Refuse weights that only unpickling, which runs any code, could read.

    Raises:
        SeqmixError: there are such weights and no safetensors.
    """
    files = [source] if source.is_file() else sorted(source.glob("*")) if source.is_dir() else []
    pickles = [file for file in files if file.suffix in PICKLES]
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise SeqmixError(
            f"{pickles[0]} is a pickle, which may run any code when it is read: where you trust it, write safetensors "
            f"of it, by save_pretrained in transformers, or by safetensors.torch.save_file(torch.load("
            f"{pickles[0].name!r}, weights_only=True), {SAFETENSORS!r})"
        )


def read_weights(source: Path) -> Mapping[str, Tensor]:
    """All tensors of a folder's safetensors files.

    Raises:
        SeqmixError: there are no such files, or one is damaged.
    """
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise SeqmixError(f"{source} has no *.safetensors")
    return read_tensors(files)[0]


def require_size(source: Path, model: LanguageModel) -> None:
    """Refuse a configuration of far more parameters than a folder's weights have bytes, before rules are made of it.

    Raises:
        SeqmixError: it has.
    """
    count = sum(parameter.numel() for parameter in model.parameters())  # a tied one once
    size = sum(file.stat().st_size for file in source.glob("*.safetensors") if file.is_file())
    if size and count > 2 * size:
        raise SeqmixError(
            f"{source / CONFIGS[0]} describes another model: expected at most {size:,} parameters, the bytes of "
            f"*.safetensors beside it, got {count:,}"
        )


def begin_token(vocabulary: bytes, file: Path, config: Mapping[str, Any]) -> str | None:
    """The token of a tokenizer.json that opens a document in a configuration; None to add one.

    Raises:
        SeqmixError: it is not a tokenizer, or the library that reads it is not installed.
    """
    SubwordTokenizer(vocabulary, file)  # from here on its added tokens are a list of ids with contents
    ids = {token["id"]: token["content"] for token in json.loads(vocabulary).get("added_tokens") or []}
    for name in ("bos_token_id", "eos_token_id"):
        chosen = config.get(name)
        for number in chosen if isinstance(chosen, list) else [chosen]:
            if number in ids:
                return ids[number]
    return None


def write_run(
    out: Path, model: ModelConfig, tensors: Mapping[str, Tensor], vocabulary: bytes | None, begin: str | None
) -> None:
    """A run directory with a checkpoint of step 0.

    Raises:
        SeqmixError: the directory is taken or cannot be written.
    """
    require_vacant(out, "--to")
    data = {} if vocabulary is None else {"tokenizer": str(out / TOKENIZER_FILE), "begin_token": begin}
    training = {"steps": 1000, "batch_size": 8, "learning_rate": 1e-4}
    fields = {"model": model.model_dump(), "data": {"kind": "text", **data}, "training": training}
    try:
        run = RunConfig.model_validate(fields)
    except ValidationError as error:  # text as bytes needs 257 tokens
        reason = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
        raise SeqmixError(f"{out} cannot be a run: {reason}") from error
    saved_run.write_run(out, run, tensors, comment=COMMENT, vocabulary=vocabulary)


def write_folder(out: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], vocabulary: bytes | None) -> None:
    """A folder as the other library reads it.

    Raises:
        SeqmixError: it is taken or cannot be written.
    """
    require_vacant(out, "--to")
    with replacing_folder(out) as partial:
        write_file(json.dumps(config, indent=2, default=str) + "\n", partial / CONFIGS[0])
        if vocabulary is not None:
            write_file(vocabulary, partial / TOKENIZER_FILE)
        write_tensors(partial / SAFETENSORS, tensors, {"format": "pt"})
