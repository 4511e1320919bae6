"""Convert a model of another library to a run directory, and a run to a model folder of another library."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...models import TOKENIZER_FILE, build_meta
from ...registry import DataError, SeqmixError, nearest_hint, read_bytes, require_name
from ...registry.deprecated import former_parameters
from ...training import Choice
from ...training.checkpoint.saved_run import read_weights
from . import files, fla, hybrids, jamba, kimi_linear, llama, mamba, recurrent_gemma, rwkv, torchscale
from .architecture import Architecture
from .layout import Rule, to_ours, to_theirs

DECLARED: list[type[Architecture]] = [
    *(llama.Llama, llama.Mistral, llama.Qwen2, llama.Qwen3),
    *(mamba.FlaMamba2, mamba.Mamba2, mamba.Mamba, jamba.Jamba),
    *(fla.RetNet, fla.GLA, fla.DeltaNet, fla.GatedDeltaNet, fla.KDA),
    *(hybrids.Qwen3Next, hybrids.MiniMax, hybrids.OlmoHybrid, kimi_linear.KimiLinear, recurrent_gemma.RecurrentGemma),
    *(rwkv.RWKV4, rwkv.RWKV7, torchscale.TorchscaleRetNet),
]
ARCHITECTURES: dict[str, Architecture] = {each.name: each() for each in DECLARED}
"""All supported architectures by name. If two share a `model_type`, the one with a `marker` comes first."""


def architecture_of(name: str) -> Architecture:
    """Return the architecture of this name.

    Raises:
        SeqmixError: the name is unknown.
    """
    require_name("architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name]


def recognised(config: Mapping[str, Any], where: object) -> Architecture:
    """Return the architecture of a model from the fields of its config.json.

    Raises:
        SeqmixError: the architecture is unknown; the message lists the supported ones.
    """
    for architecture in ARCHITECTURES.values():
        if architecture.recognises(config):
            return architecture
    kind = config.get("model_type")
    known = [each.model_type for each in ARCHITECTURES.values() if each.model_type]
    problem = "no model_type" if kind is None else f"the unknown model_type {kind!r}"
    hint = nearest_hint(str(kind), known) or "."
    raise SeqmixError(f"{where} has {problem}{hint} Supported architectures: {', '.join(ARCHITECTURES)}")


def import_from(source: Path, out: Path | None, tokenizer: str | None = None) -> tuple[Architecture, list[Rule]]:
    """Convert another library's model to a run directory with a checkpoint of step 0.

    Args:
        source: a folder with config.json and safetensors files.
        out: the run directory to write; None checks the model and writes nothing.
        tokenizer: path of a tokenizer.json, or `bytes`; None uses the tokenizer.json in the folder.

    Returns:
        The model's architecture, and the rule that each tensor was converted by.

    Raises:
        SeqmixError: the architecture, a field or a tensor has no counterpart in seqmix, or a file cannot be read or
            written.
    """
    values = files.read_config(source)
    architecture = recognised(values, source)
    config = architecture.config(values, source / files.CONFIGS[0])
    model = build_meta(config)
    files.require_size(source, model)
    rules = list(architecture.rules(model))
    if out is None:
        return architecture, rules
    in_folder = source / TOKENIZER_FILE
    if tokenizer is None and not in_folder.is_file():
        raise SeqmixError(
            f"{source} has no {TOKENIZER_FILE}: use --tokenizer FILE, or --tokenizer bytes if its tokens are bytes"
        )
    file = in_folder if tokenizer is None else Path(tokenizer)
    try:
        vocabulary = None if tokenizer == "bytes" else read_bytes(file)
    except OSError as error:
        raise DataError(f"the tokenizer {file} cannot be read: {error.strerror}") from error
    begin = None if vocabulary is None else files.begin_token(vocabulary, file, values)
    copies = {architecture.head: architecture.embedding} if config.tie_embeddings else {}
    theirs = files.read_weights(source)
    for alias, usual in architecture.tensor_aliases(values).items():
        theirs = {name.replace(alias, usual): x for name, x in theirs.items()}
    theirs = architecture.file_tensors(theirs, model)
    tensors = to_ours(rules, theirs, source, architecture.ignored_tensors, copies)
    files.write_run(out, config, tensors, vocabulary, begin)
    return architecture, rules


@former_parameters(tell="on_note")
def export_to(
    run: Path,
    out: Path | None,
    name: str,
    *,
    choice: Choice = "newest",
    on_note: Callable[[str], object],
    trust: bool = False,
) -> tuple[Architecture, list[Rule]]:
    """Convert a trained model to a model folder of another library.

    Args:
        run: a run directory, or a file of `seqmix export`.
        out: the folder to write; None checks the model and writes nothing.
        name: name of the architecture.
        choice: which checkpoint to read, as in `load_run`.
        on_note: receives notes about the run, as in `load_run`.
        trust: allow the run to import modules, as in `load_run`.

    Returns:
        The architecture, and the rule that each tensor was converted by.

    Raises:
        SeqmixError: the model has a field or tensor without a counterpart in the architecture, or a file cannot be read
            or written.
    """
    architecture = architecture_of(name)
    config, tensors, vocabulary = read_weights(run, choice=choice, on_note=on_note, trust=trust)
    fields = architecture.fields(config)
    model = build_meta(config)
    rules = list(architecture.rules(model))
    if out is not None:
        theirs = to_theirs(rules, tensors) | architecture.computed_tensors(model)
        if architecture.model_type:
            fields = {**fields, "dtype": str(next(iter(theirs.values())).dtype).removeprefix("torch.")}
        files.write_folder(out, fields, theirs, vocabulary)
    return architecture, rules
