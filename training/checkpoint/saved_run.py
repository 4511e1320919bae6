"""Loading a run from disk, and exporting its weights as one file."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...configs import PRESETS
from ...models import TOKENIZER_FILE, LanguageModel, ModelConfig, SubwordTokenizer, Tokenizer, build_model
from ...models.subword import EXPORTED_TOKENIZER
from ...registry import ConfigError, dump, load, replacing_folder, require_trusted, unimported, write_file
from ...registry.sources import read
from ..config import RunConfig
from ..tensor_files import fill, read_tensors, write_tensors
from . import files as checkpoint
from . import train_state
from .files import CheckpointError, Choice
from .provenance import missing_plug_ins
from .run_dir import CONFIG_FILE

OTHER_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""Types of safetensors other than the model's, and their names."""
EXPORTED_CONFIG = "seqmix.config"
"""The metadata key of the run's configuration in an exported file, as JSON; `EXPORTED_TOKENIZER` has a vocabulary."""


def read_config(
    run: Path,
    changes: Sequence[str] = (),
    *,
    tell: Callable[[str], object] = warnings.warn,
) -> RunConfig:
    """The resolved configuration of a run, with overrides as "dotted.path=value".

    `tell` is called with a sentence for each module that it is about to import for a dotted path.

    Raises:
        CheckpointError: it is not a run directory.
        ConfigError: its configuration is no longer valid.
    """
    if not (run / CONFIG_FILE).is_file():
        what = f"holds no {CONFIG_FILE}" if run.is_dir() else "is a file" if run.exists() else "does not exist"
        raise CheckpointError(f"{run} is not a run directory: it {what}; `seqmix train` writes one")
    try:
        for module in modules_of(run):
            tell(f"{run} imports the module {module}")
        return load(RunConfig, run / CONFIG_FILE, changes, presets=PRESETS)
    except ConfigError as error:
        raise ConfigError(f"{error}{missing_plug_ins(run)}") from error


def modules_of(run: Path) -> list[str]:
    """The modules that a run's model names by dotted paths, and that are not imported yet.

    Raises:
        ConfigError: its configuration cannot be read.
    """
    kinds = [kind.value for part in read(run / CONFIG_FILE, PRESETS).parts() if (kind := part.child("kind"))]
    return list(dict.fromkeys(path.partition(":")[0] for path in unimported(kinds)))


def load_run(
    run: str | Path,
    *,
    device: torch.device | str = "cpu",
    choice: Choice = "newest",
    tell: Callable[[str], object] = warnings.warn,
    ema: bool = False,
    trust: bool = False,
) -> LanguageModel:
    """The trained model of a run, or of a file of `export_run`, with its tokenizer, in evaluation mode.

    Args:
        run: the run directory, or the file.
        device: the model's device.
        choice: which checkpoint: the newest, the best, or that of a step. If its parameters are damaged, the previous
            one is loaded.
        tell: called with a sentence for each checkpoint that was skipped.
        ema: whether its weights are the moving average of training.ema.
        trust: whether a file may import modules that it names by dotted paths; a run directory always may.

    Raises:
        SeqmixError: it is neither a run nor such a file, or is missing, damaged or of another model, or its tokenizer
            cannot be read; or it has no moving average.
    """
    run = Path(run)
    if run.is_file() and ema:
        raise CheckpointError(f"{run} is an exported file: `seqmix export --ema` writes the moving average to one")
    if run.is_file():
        model = _load_file(run, device, trust)
        _tell_conversion([run], tell)
        return model
    model, _ = _load_checkpoint(run, read_config(run, tell=tell), device, choice, tell, ema)
    return model.eval()


def read_weights(
    run: Path, *, choice: Choice = "newest", tell: Callable[[str], object] = warnings.warn, trust: bool = False
) -> tuple[ModelConfig, Mapping[str, Tensor], bytes | None]:
    """The model of a run, or of a file of `export_run`: its configuration, its tensors as they were written, and its
    tokenizer.json (None for bytes).

    Raises:
        SeqmixError: as `load_run`.
    """
    if run.is_file():
        config, found, tokenizer = _read_file(run, trust)
    else:
        whole = read_config(run, tell=tell)
        config = whole.model
        tokenizer = whole.data.tokenizer_of(run)
        read: list[Mapping[str, Tensor]] = []

        def use(folder: Path) -> None:
            read.append(read_tensors(checkpoint.files_of(folder, train_state.MODEL))[0])

        _read(run, choice, train_state.MODEL, use, tell)
        found = read[-1]
    return config, found, None if tokenizer is None else tokenizer.vocabulary


def export_run(
    run: Path, out: Path, *, choice: Choice = "newest", tell: Callable[[str], object] = warnings.warn, ema: bool = False
) -> int:
    """Export the weights of a run to one safetensors file, with its configuration in the metadata.

    Args:
        run: the run directory.
        out: the file, which must not exist.
        choice: which checkpoint, as in `load_run`.
        tell: as in `load_run`.
        ema: as in `load_run`.

    Returns:
        The step of the checkpoint.

    Raises:
        SeqmixError: it is not a run, its checkpoints are missing or damaged, or the file cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out} already exists: give --out the name of a new file")
    config = read_config(run, tell=tell)
    model, step = _load_checkpoint(run, config, "cpu", choice, tell, ema)
    metadata = {"format": "pt", "seqmix.step": str(step), EXPORTED_CONFIG: config.model_dump_json()}
    if model.tokenizer is not None and model.tokenizer.vocabulary is not None:
        metadata[EXPORTED_TOKENIZER] = model.tokenizer.vocabulary.decode()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error
    write_tensors(out, train_state.parameters_of(model), metadata)
    return step


def write_run(
    out: Path,
    config: RunConfig,
    tensors: Mapping[str, Tensor],
    *,
    step: int = 0,
    comment: str = "",
    vocabulary: bytes | None = None,
) -> None:
    """Write a new run directory of weights that no optimizer has: it evaluates, generates and exports as any other.

    It appears when it is whole. `comment` has lines above the configuration, each with `#`; `vocabulary` is the content
    of a tokenizer.json, None for bytes.

    Raises:
        SeqmixError: the directory holds something, or cannot be written.
    """
    with replacing_folder(out) as partial:
        add_run(partial, config, tensors, step=step, comment=comment, vocabulary=vocabulary)


def add_run(
    folder: Path,
    config: RunConfig,
    tensors: Mapping[str, Tensor],
    *,
    step: int = 0,
    comment: str = "",
    vocabulary: bytes | None = None,
) -> None:
    """Make an existing folder a run directory, as `write_run`: its configuration comes last, as it is one from then on.

    Raises:
        SeqmixError: a file cannot be written.
    """
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    if vocabulary is not None:
        write_file(vocabulary, folder / TOKENIZER_FILE)
    parts = {train_state.MODEL: train_state.chunks_of(tensors)}
    metadata = train_state.metadata_of(config.model, step)
    checkpoint.write(folder, checkpoint.Manifest(step=step, metrics={}, best=checkpoint.Best()), parts, metadata)
    write_file(comment + dump(config), folder / CONFIG_FILE)


def _read(
    run: Path, choice: Choice, part: str, use: Callable[[Path], object], tell: Callable[[str], object]
) -> checkpoint.IntactCheckpoint:
    # damaged moments do not matter: only the parameters are needed
    found = checkpoint.read(run, choice, part, use)
    for note in found.notes:
        tell(note)
    return found


def _load_checkpoint(
    run: Path, config: RunConfig, device: torch.device | str, choice: Choice, tell: Callable[[str], object], ema: bool
) -> tuple[LanguageModel, int]:
    if ema and config.training.ema is None:
        raise CheckpointError(f"{run} has no moving average of its weights: it was trained without training.ema")
    part = train_state.EMA if ema else train_state.MODEL
    checkpoint.find(run, choice, parts=())  # what is missing is said before a large model is built
    model = build_model(config.model, device=device)
    model.tokenizer = config.data.tokenizer_of(run)
    found = _read(run, choice, part, lambda folder: train_state.load_model(folder, model, part), tell)
    _tell_conversion([found.folder / name for name in found.manifest.files_of(part)], tell)
    return model, found.manifest.step


def _tell_conversion(files: Sequence[Path], tell: Callable[[str], object]) -> None:
    """Say which weights are of another type than the float32 that they are loaded as."""
    kinds: set[str] = set()
    for file in files:
        with suppress(OSError, SafetensorError), safe_open(file, "pt") as opened:  # a run that trains deletes old ones
            kinds |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 not a mapping
    if others := sorted(OTHER_FLOATS[kind] for kind in kinds & OTHER_FLOATS.keys()):
        tell(f"{files[0]} has weights in {' and '.join(others)}, which are loaded as float32")


def _load_file(file: Path, device: torch.device | str, trust: bool) -> LanguageModel:
    config, _, tokenizer = _read_file(file, trust)
    model = build_model(config, device=device)
    if tokenizer is not None:
        model.tokenizer = tokenizer
    fill([file], train_state.chunks_of(train_state.parameters_of(model)))
    return model.eval()


def _read_file(file: Path, trust: bool) -> tuple[ModelConfig, Mapping[str, Tensor], Tokenizer | None]:
    found, metadata = read_tensors([file])
    try:
        # only what is needed: the rest may be of another version
        whole = json.loads(metadata[EXPORTED_CONFIG])
        if not trust:
            require_trusted(whole["model"], file, "give --trust (trust=True)")
        config = ModelConfig.model_validate(whole["model"])
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    except KeyError as error:
        raise CheckpointError(f"{file} has weights without a configuration: `seqmix export` writes both") from error
    except (ValueError, TypeError, RecursionError) as error:
        reason = "; ".join(str(error).splitlines())
        raise CheckpointError(f"{file} has an invalid configuration: {reason}") from error
    if EXPORTED_TOKENIZER not in metadata:
        return config, found, None
    if not isinstance(data := whole.get("data", {}), dict):
        raise CheckpointError(f"{file} has an invalid configuration: its data is not a mapping")
    begin = data.get("begin_token")
    return config, found, SubwordTokenizer(metadata[EXPORTED_TOKENIZER].encode(), f"in {file}", begin)
