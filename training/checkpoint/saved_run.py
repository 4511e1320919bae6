"""Loading a run from disk, and exporting its weights as one file."""

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...configs import PRESETS
from ...models import TOKENIZER_FILE, LanguageModel, ModelConfig, SubwordTokenizer, Tokenizer, build_model
from ...models.quantization import WEIGHTS, prepare_quantized, quantize_model, require_intact, weights_of
from ...models.subword import EXPORTED_TOKENIZER
from ...registry import (
    ConfigError,
    dump,
    load,
    nearest_hint,
    plug_in_sources,
    replacing_folder,
    require_name,
    require_trusted,
    write_file,
)
from ...registry.deprecated import former_parameters
from ...registry.providers import named_paths
from ...registry.sources import read
from ..config import RunConfig
from ..tensor_files import fill, read_tensors, seal, verify_seal, write_tensors
from . import files as checkpoint
from . import train_state
from .code import CODE, code_of, decode_code, encode_code, prepare_code, read_code, write_code
from .files import CheckpointError, Choice
from .provenance import missing_plug_ins
from .run_dir import CONFIG_FILE

OTHER_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""Names of the floating-point dtypes other than float32, by the type's name in safetensors files."""
EXPORTED_CONFIG = "seqmix.config"
"""Key in the metadata of an exported file whose value is the run's configuration, as JSON.

The key of the tokenizer is `EXPORTED_TOKENIZER`.
"""
EXPORTED_CODE = "seqmix.code"
"""Key in the metadata of an exported file whose value is the source of its plug-ins by file name, as JSON; absent
without plug-ins."""
EXPORTED_WEIGHTS = "seqmix.weights"
"""Key in the metadata of an exported file whose value is the format of quantised weights; absent for floats."""


@former_parameters(tell="on_note")
def read_config(
    run: Path,
    changes: Sequence[str] = (),
    *,
    on_note: Callable[[str], object] = warnings.warn,
    trust: bool = False,
) -> RunConfig:
    """Read the resolved configuration of a run.

    Args:
        run: the run directory.
        changes: overrides, each "dotted.path=value".
        on_note: called with a sentence for each module that a dotted path is about to import.
        trust: True if modules may be imported from the copies of their source in the run (`code`), where Python does
            not find them, or finds another source.

    Raises:
        CheckpointError: `run` is not a run directory.
        ConfigError: the configuration is no longer valid.
    """
    require_run(run)
    plug_in_sources.forbid(run)
    prepare_code(read_code(run), _named_modules(run), str(run / CODE), trust=trust, on_note=on_note)
    try:
        for module in modules_of(run):
            on_note(f"{run} imports the module {module}")
        return load(RunConfig, run / CONFIG_FILE, changes, presets=PRESETS)
    except ConfigError as error:
        raise ConfigError(f"{error}{missing_plug_ins(run)}") from error


def require_run(run: Path, *, or_file: bool = False) -> None:
    """Raise CheckpointError unless `run` is a run directory, or any file if `or_file`."""
    if (run / CONFIG_FILE).is_file() or (or_file and run.is_file()):
        return
    reason = "it is a file" if run.exists() else "it does not exist"
    if run.is_dir():
        reason = f"it has no {CONFIG_FILE}"
    siblings = (path.name for path in run.absolute().parent.glob("*/")) if not run.exists() else ()
    raise CheckpointError(
        f"{run} is not a run directory: {reason}; `seqmix train` writes one{nearest_hint(run.name, siblings)}"
    )


def modules_of(run: Path) -> list[str]:
    """Return the modules that a run's configuration names by dotted paths and that are not imported yet.

    Raises:
        ConfigError: the configuration cannot be read.
    """
    return [module for module in _named_modules(run) if module not in sys.modules]


def _named_modules(run: Path) -> list[str]:
    """Return the modules that a run's configuration names by dotted paths, imported or not."""
    kinds = [kind.value for part in read(run / CONFIG_FILE, PRESETS).parts() if (kind := part.child("kind"))]
    paths = sorted({kind for kind in kinds if isinstance(kind, str) and ":" in kind})
    return list(dict.fromkeys(path.partition(":")[0] for path in paths))


@former_parameters(tell="on_note")
def load_run(
    run: str | Path,
    *,
    device: torch.device | str = "cpu",
    choice: Choice = "newest",
    on_note: Callable[[str], object] = warnings.warn,
    ema: bool = False,
    trust: bool = False,
    weights: str | None = None,
) -> LanguageModel:
    """Load the trained model of a run, or of a file of `export_run`, with its tokenizer, in evaluation mode.

    Args:
        run: the run directory, or the file.
        device: the model's device.
        choice: the checkpoint: "newest", "best" (by validation loss), or a step. If the parameters of the newest are
            damaged, the previous one is loaded; instead of the best, the next best.
        on_note: called with a sentence for each damaged checkpoint, each module about to be imported, and weights that
            are converted to float32.
        ema: True to load the moving average of the weights (training.ema).
        trust: True if a file may import the modules that it names by dotted paths (a run directory always may), and if
            both may import the copies of their source that they carry.
        weights: "int8" or "int4" to quantise the weights after loading (`models.quantization`); None loads them as they
            are saved.

    Raises:
        SeqmixError: `run` is missing, damaged, or neither a run directory nor an exported file; its model or tokenizer
            cannot be loaded; it has no moving average; or its weights cannot be quantised.
    """
    run = Path(run)
    if run.is_file() and run.suffix == ".onnx":
        raise CheckpointError(
            f"{run} is an ONNX file, which only `seqmix generate` runs: give the run directory, or a .safetensors file "
            "of `seqmix export`"
        )
    if run.is_file() and ema:
        raise CheckpointError(
            f"{run} is an exported file, which has one set of weights: leave out --ema (ema=True); `seqmix export "
            "--ema` writes the moving average"
        )
    if weights is not None:
        require_name("weight format", weights, WEIGHTS)
    if run.is_file():
        model = _load_file(run, device, trust, on_note)
        if (saved := weights_of(model)) is None:
            _report_conversion([run], on_note)
        elif weights not in (None, saved):
            raise CheckpointError(
                f"{run} has {saved} weights: leave out --weights {weights} (weights={weights!r}), or give it a run "
                "directory"
            )
        else:
            return model
    else:
        model, _ = load_checkpoint(run, read_config(run, on_note=on_note, trust=trust), device, choice, on_note, ema)
    return model.eval() if weights is None else _quantize(model, weights, run, on_note)


def read_weights(
    run: Path, *, choice: Choice = "newest", on_note: Callable[[str], object] = warnings.warn, trust: bool = False
) -> tuple[ModelConfig, Mapping[str, Tensor], bytes | None]:
    """Read the model of a run, or of a file of `export_run`, without building it.

    Args:
        run: the run directory, or the file.
        choice: the checkpoint, as in `load_run`.
        on_note: as in `load_run`.
        trust: as in `load_run`.

    Returns:
        The model's configuration, its tensors in the dtypes of the file, and the content of its tokenizer.json (None
        for bytes, or if its tokens are not text).

    Raises:
        SeqmixError: as for `load_run`.
    """
    if run.is_file():
        config, tensors, tokenizer, weights = _read_file(run, trust, on_note)
        if weights is not None:
            raise CheckpointError(
                f"{run} has {weights} weights, from which the original ones cannot be recovered: export the run "
                "without --weights"
            )
    else:
        run_config = read_config(run, on_note=on_note, trust=trust)
        config = run_config.model
        tokenizer = run_config.data.tokenizer_of(run)
        attempts: list[Mapping[str, Tensor]] = []

        def use(folder: Path) -> None:
            files = checkpoint.files_of(folder, train_state.MODEL)
            tensors, metadata = read_tensors(files)
            train_state.require_same_tokenizer(files[0], metadata, tokenizer)
            attempts.append(tensors)

        _read_checkpoint(run, choice, train_state.MODEL, use, on_note)
        tensors = attempts[-1]
    return config, tensors, None if tokenizer is None else tokenizer.vocabulary


@former_parameters(tell="on_note")
def export_run(
    run: Path,
    out: Path,
    *,
    choice: Choice = "newest",
    on_note: Callable[[str], object] = warnings.warn,
    ema: bool = False,
    weights: str | None = None,
    trust: bool = False,
) -> int:
    """Export the weights of a run to one safetensors file, with its configuration in the metadata.

    Args:
        run: the run directory.
        out: the output file, which must not exist.
        choice: the checkpoint, as in `load_run`.
        on_note: as in `load_run`.
        ema: as in `load_run`.
        weights: "int8" or "int4" to quantise the weights, as in `load_run`.
        trust: as in `load_run`.

    Returns:
        The step of the checkpoint.

    Raises:
        SeqmixError: `run` is not a run directory, its checkpoints are missing or damaged, its weights cannot be
            quantised, or `out` cannot be written.
    """
    if weights is not None:
        require_name("weight format", weights, WEIGHTS)
    if out.exists():
        raise CheckpointError(f"{out} already exists: give --out the name of a new file")
    config = read_config(run, on_note=on_note, trust=trust)
    model, step = load_checkpoint(run, config, "cpu", choice, on_note, ema)
    metadata = {"format": "pt", "seqmix.step": str(step), EXPORTED_CONFIG: config.model_dump_json()}
    if code := code_of(config):
        metadata[EXPORTED_CODE] = encode_code(code)
    if weights is not None:
        _quantize(model, weights, run, on_note)
        metadata[EXPORTED_WEIGHTS] = weights
    if model.tokenizer is not None and model.tokenizer.vocabulary is not None:
        metadata[EXPORTED_TOKENIZER] = model.tokenizer.vocabulary.decode()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error
    tensors = train_state.parameters_of(model)
    write_tensors(out, tensors, seal(tensors, metadata))
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
    """Write a new run directory from weights without optimizer state; it appears once it is complete.

    It evaluates, generates and exports like any other run directory, but cannot be resumed.

    Args:
        out: the new run directory.
        config: the configuration.
        tensors: the weights, by name.
        step: step of the checkpoint.
        comment: comment lines above the configuration, each starting with `#`.
        vocabulary: content of a tokenizer.json; None for bytes.

    Raises:
        SeqmixError: the directory is not empty, or cannot be written.
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
    """Turn an existing folder into a run directory. Arguments are those of `write_run`.

    The configuration is written last: it makes the folder a run directory.

    Raises:
        SeqmixError: a file cannot be written.
    """
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    if vocabulary is not None:
        write_file(vocabulary, folder / TOKENIZER_FILE)
    parts = {train_state.MODEL: train_state.chunks_of(tensors)}
    metadata = train_state.metadata_of(config.model, step, vocabulary)
    checkpoint.write(folder, checkpoint.Manifest(step=step, metrics={}, best=checkpoint.Best()), parts, metadata)
    write_code(folder, code_of(config))
    write_file(comment + dump(config), folder / CONFIG_FILE)


def _read_checkpoint(
    run: Path, choice: Choice, part: str, use: Callable[[Path], object], on_note: Callable[[str], object]
) -> checkpoint.IntactCheckpoint:
    """Call `use` with an intact checkpoint, and report the damaged ones that were skipped."""
    # only this part must be intact: the optimizer's state is not needed
    intact = checkpoint.read(run, choice, part, use)
    for note in intact.notes:
        on_note(note)
    return intact


def load_checkpoint(
    run: Path,
    config: RunConfig,
    device: torch.device | str,
    choice: Choice,
    on_note: Callable[[str], object],
    ema: bool,
) -> tuple[LanguageModel, int]:
    """Load the trained model of a run directory with this configuration, and its step; arguments as in `load_run`."""
    if ema and config.training.ema is None:
        raise CheckpointError(
            f"{run} has no moving average of its weights: it was trained without training.ema; leave out --ema"
        )
    part = train_state.EMA if ema else train_state.MODEL
    checkpoint.find(run, choice, parts=())  # report a missing checkpoint before building a large model
    model = build_model(config.model, device=device)
    model.tokenizer = config.data.tokenizer_of(run)
    intact = _read_checkpoint(run, choice, part, lambda folder: train_state.load_model(folder, model, part), on_note)
    _report_conversion([intact.folder / name for name in intact.manifest.files_of(part)], on_note)
    return model, intact.manifest.step


def _quantize(model: LanguageModel, weights: str, run: Path, on_note: Callable[[str], object]) -> LanguageModel:
    """Quantise the weights of a run's model; the note says how to measure the loss."""
    hint = f"; `seqmix evaluate {run} --weights {weights}` measures the loss" if run.is_dir() else ""
    return quantize_model(model, weights, on_note=lambda text: on_note(text + hint))


def _report_conversion(files: Sequence[Path], on_note: Callable[[str], object]) -> None:
    """Report weights that are stored in another type than float32, and were converted to it."""
    types: set[str] = set()
    for file in files:
        with suppress(OSError, SafetensorError), safe_open(file, "pt") as opened:  # training may delete old checkpoints
            types |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 not a mapping
    if dtypes := sorted(OTHER_FLOATS[type_] for type_ in types & OTHER_FLOATS.keys()):
        on_note(f"{files[0]} has weights in {' and '.join(dtypes)}, which are loaded as float32")


def _load_file(file: Path, device: torch.device | str, trust: bool, on_note: Callable[[str], object]) -> LanguageModel:
    config, _, tokenizer, weights = _read_file(file, trust, on_note)
    model = build_model(config, device=device)
    if weights is not None:
        prepare_quantized(model, weights)
    if tokenizer is not None:
        model.tokenizer = tokenizer
    fill([file], train_state.chunks_of(train_state.parameters_of(model)))
    require_intact(model, file)
    return model.eval()


def _read_file(
    file: Path, trust: bool, on_note: Callable[[str], object]
) -> tuple[ModelConfig, Mapping[str, Tensor], Tokenizer | None, str | None]:
    """Read an exported file: the model's configuration, the tensors, the tokenizer (None for bytes), and the format of
    quantised weights (None for floats)."""
    tensors, metadata = read_tensors([file])
    verify_seal(file, tensors, metadata)
    weights = metadata.get(EXPORTED_WEIGHTS)
    if weights is not None and weights not in WEIGHTS:
        raise CheckpointError(
            f"{file} has weights in an unknown format: expected {' or '.join(WEIGHTS)}, got {weights!a:.40}; it "
            "may be from a newer version of seqmix"
        )
    try:
        # only the model is validated: the rest may be from another version
        run_config = json.loads(metadata[EXPORTED_CONFIG])
        if trust:
            modules = [path.partition(":")[0] for path in named_paths(run_config["model"])]
            sources = decode_code(metadata.get(EXPORTED_CODE, "{}"))
            prepare_code(sources, modules, f"{file}/{CODE}", trust=True, on_note=on_note)
        else:
            require_trusted(run_config["model"], file, "give --trust (trust=True)")
        config = ModelConfig.model_validate(run_config["model"])
    except ConfigError:  # its code is not trusted
        raise
    except KeyError as error:
        raise CheckpointError(f"{file} has weights without a configuration: `seqmix export` writes both") from error
    except (ValueError, TypeError, RecursionError) as error:
        reason = "; ".join(str(error).splitlines())
        raise CheckpointError(f"{file} has an invalid configuration: {reason}") from error
    if EXPORTED_TOKENIZER not in metadata:
        return config, tensors, None, weights
    if not isinstance(data := run_config.get("data", {}), dict):
        raise CheckpointError(f"{file} has an invalid configuration: its data is not a mapping")
    begin = data.get("begin_token")
    return config, tensors, SubwordTokenizer(metadata[EXPORTED_TOKENIZER].encode(), f"in {file}", begin), weights
