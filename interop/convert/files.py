"""Read model folders of other libraries, and write converted models as run directories or such folders."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from ...models import TOKENIZER_FILE, LanguageModel, ModelConfig, SubwordTokenizer
from ...registry import DataError, SeqmixError, replacing_folder, write_file
from ...training import RunConfig
from ...training.checkpoint import saved_run
from ...training.checkpoint.run_dir import require_vacant
from ...training.tensor_files import read_tensors, write_tensors

CONFIGS = ("config.json", "args.json")
"""Names of the configuration file: that of transformers and fla, and that of torchscale."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFETENSORS = "model.safetensors"
COMMENT = "# Converted by `seqmix convert`; data and training are placeholders until you set them.\n"
"""First line of the config.yaml of a converted model."""
INFINITY = {"__float__": "Infinity"}
"""Infinity as transformers writes it, because JSON has no such number."""


def read_config(source: Path) -> dict[str, Any]:
    """Read the fields of the configuration file of a model folder.

    Raises:
        SeqmixError: there is no such file, or it cannot be read.
    """
    require_no_pickle(source)
    file = next((source / name for name in CONFIGS if (source / name).is_file()), None)
    if file is None:
        if not source.exists():
            reason = "does not exist"
        elif source.is_file():
            reason = "is a file"
        else:
            reason = "has no config.json"
        raise DataError(
            f"{source} must be a model folder (config.json and *.safetensors) or a run or export of seqmix: it {reason}"
        )
    try:
        fields = json.loads(file.read_bytes(), object_hook=lambda x: math.inf if x == INFINITY else x)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise DataError(f"{file} must be a JSON object, got {type(fields).__name__}")
    return fields


def require_no_pickle(source: Path) -> None:
    """Check that a folder's weights can be read without unpickling, which can run any code.

    Raises:
        SeqmixError: the folder has pickled weights and no safetensors files.
    """
    files = [source] if source.is_file() else sorted(source.glob("*")) if source.is_dir() else []
    pickles = [file for file in files if file.suffix in PICKLES]
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise SeqmixError(
            f"{pickles[0]} is a pickle, which may run any code when it is read: if you trust it, convert it to "
            f"safetensors, with save_pretrained in transformers or with safetensors.torch.save_file(torch.load("
            f"{pickles[0].name!r}, weights_only=True), {SAFETENSORS!r})"
        )


def read_weights(source: Path) -> Mapping[str, Tensor]:
    """Read all tensors of a folder's safetensors files.

    Raises:
        SeqmixError: there are no such files, or one is damaged.
    """
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise DataError(f"{source} has no *.safetensors files: put the model's weights there in this format")
    return read_tensors(files)[0]


def require_size(source: Path, model: LanguageModel) -> None:
    """Check that config.json does not describe a model far larger than the weights beside it.

    Raises:
        SeqmixError: the model has more than twice as many parameters as the weights have bytes.
    """
    count = sum(parameter.numel() for parameter in model.parameters())  # counts tied parameters once
    size = sum(file.stat().st_size for file in source.glob("*.safetensors") if file.is_file())
    if size and count > 2 * size:
        raise SeqmixError(
            f"{source / CONFIGS[0]} describes another model: expected at most {size:,} parameters, as many as the "
            f"*.safetensors files beside it have bytes, got {count:,}"
        )


def begin_token(vocabulary: bytes, file: Path, config: Mapping[str, Any]) -> str | None:
    """Return the token of a tokenizer.json that starts documents: the model's BOS or EOS token; None to add one.

    Args:
        vocabulary: the content of the tokenizer.json.
        file: path of the tokenizer.json, for messages.
        config: the fields of config.json.

    Raises:
        SeqmixError: the file is not a tokenizer.json, or the library that reads it is not installed.
    """
    SubwordTokenizer(vocabulary, file)  # checks the structure that the next line relies on
    contents = {token["id"]: token["content"] for token in json.loads(vocabulary).get("added_tokens") or []}
    for name in ("bos_token_id", "eos_token_id"):
        value = config.get(name)
        for number in value if isinstance(value, list) else [value]:
            if number in contents:
                return contents[number]
    return None


def write_run(
    out: Path, model: ModelConfig, tensors: Mapping[str, Tensor], vocabulary: bytes | None, begin: str | None
) -> None:
    """Write a run directory with a checkpoint of step 0.

    Raises:
        SeqmixError: the directory exists already or cannot be written, or the model does not fit its tokenizer.
    """
    require_vacant(out)
    data = {} if vocabulary is None else {"tokenizer": str(out / TOKENIZER_FILE), "begin_token": begin}
    training = {"steps": 1000, "batch_size": 8, "learning_rate": 1e-4}
    fields = {"model": model.model_dump(), "data": {"kind": "text", **data}, "training": training}
    try:
        run = RunConfig.model_validate(fields)
    except ValidationError as error:  # e.g. a vocabulary too small for bytes
        reason = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
        raise SeqmixError(f"{out} cannot be a run: {reason}") from error
    saved_run.write_run(out, run, tensors, comment=COMMENT, vocabulary=vocabulary)


def write_folder(out: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], vocabulary: bytes | None) -> None:
    """Write a model folder in the format of the other library.

    Raises:
        SeqmixError: the folder exists already or cannot be written.
    """
    require_vacant(out)
    with replacing_folder(out) as partial:
        write_file(json.dumps(config, indent=2, default=str) + "\n", partial / CONFIGS[0])
        if vocabulary is not None:
            write_file(vocabulary, partial / TOKENIZER_FILE)
        write_tensors(partial / SAFETENSORS, tensors, {"format": "pt"})
