"""A model of another library to a run directory, and a run to a folder of theirs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..models import TOKENIZER_FILE, build_meta
from ..registry import SeqmixError, nearest, read_bytes, require_name
from ..training import Choice
from ..training.checkpoint.saved_run import read_weights
from . import files, fla, hybrids, kimi_linear, llama, mamba, recurrent_gemma, rwkv, torchscale
from .architecture import Architecture
from .layout import Rule, to_ours, to_theirs

DECLARED: list[type[Architecture]] = [
    *(llama.Llama, llama.Mistral, llama.Qwen2, llama.Qwen3),
    *(mamba.FlaMamba2, mamba.Mamba2, mamba.Mamba),
    *(fla.RetNet, fla.GLA, fla.DeltaNet, fla.GatedDeltaNet, fla.KDA),
    *(hybrids.Qwen3Next, hybrids.MiniMax, hybrids.OlmoHybrid, kimi_linear.KimiLinear, recurrent_gemma.RecurrentGemma),
    *(rwkv.RWKV4, rwkv.RWKV7, torchscale.TorchscaleRetNet),
]
ARCHITECTURES: dict[str, Architecture] = {each.name: each() for each in DECLARED}
"""All that is known, by name; of two with one model_type, the one with a marker comes first."""


def architecture_of(name: str) -> Architecture:
    """The architecture of this name.

    Raises:
        SeqmixError: there is none.
    """
    require_name("architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name]


def recognised(config: Mapping[str, Any], where: object) -> Architecture:
    """The architecture of a configuration.

    Raises:
        SeqmixError: it is not known; those that are.
    """
    for architecture in ARCHITECTURES.values():
        if architecture.recognises(config):
            return architecture
    kind = str(config.get("model_type", "no model_type"))
    known = [each.model_type for each in ARCHITECTURES.values() if each.model_type]
    raise SeqmixError(
        f"{where} is of an unknown architecture, {kind}; known: {', '.join(ARCHITECTURES)}{nearest(kind, known)}"
    )


def import_from(source: Path, out: Path | None, tokenizer: str | None = None) -> tuple[Architecture, list[Rule]]:
    """Write another library's model as a run directory, with a checkpoint of step 0; nothing where `out` is None.

    `source` is a folder with config.json and safetensors; `tokenizer` a tokenizer.json, or `bytes`, the folder's own
    when None.

    Returns:
        What it is, and where every tensor came from.

    Raises:
        SeqmixError: the architecture, a field or a tensor has no counterpart here, or a file cannot be read or written.
    """
    values = files.read_config(source)
    architecture = recognised(values, source)
    config = architecture.config(values, source / files.CONFIGS[0])
    model = build_meta(config)
    files.require_size(source, model)
    rules = list(architecture.rules(model))
    if out is None:
        return architecture, rules
    own = source / TOKENIZER_FILE
    if tokenizer is None and not own.is_file():
        raise SeqmixError(
            f"{source} has no {TOKENIZER_FILE}: give --tokenizer FILE, or --tokenizer bytes if its tokens are bytes"
        )
    file = own if tokenizer is None else Path(tokenizer)
    try:
        vocabulary = None if tokenizer == "bytes" else read_bytes(file)
    except OSError as error:
        raise SeqmixError(f"the tokenizer {file} cannot be read: {error.strerror}") from error
    begin = None if vocabulary is None else files.begin_token(vocabulary, file, values)
    copies = {architecture.head: architecture.embedding} if config.tie_embeddings else {}
    theirs = files.read_weights(source)
    for other, usual in architecture.renamed(values).items():
        theirs = {name.replace(other, usual): x for name, x in theirs.items()}
    tensors = to_ours(rules, theirs, source, architecture.unread, copies)
    files.write_run(out, config, tensors, vocabulary, begin)
    return architecture, rules


def export_to(
    run: Path,
    out: Path | None,
    name: str,
    *,
    choice: Choice = "newest",
    tell: Callable[[str], object],
    trust: bool = False,
) -> tuple[Architecture, list[Rule]]:
    """Write a trained model, a run directory or a file of `seqmix export`, as a folder of the architecture `name`.

    Nothing is written where `out` is None; `choice`, `tell` and `trust` are as in `load_run`.

    Raises:
        SeqmixError: the model has what the architecture has not, or a file cannot be read or written.
    """
    architecture = architecture_of(name)
    config, tensors, vocabulary = read_weights(run, choice=choice, tell=tell, trust=trust)
    fields = architecture.fields(config)
    model = build_meta(config)
    rules = list(architecture.rules(model))
    if out is not None:
        theirs = to_theirs(rules, tensors) | architecture.derived(model)
        dtype = str(next(iter(theirs.values())).dtype).removeprefix("torch.")
        files.write_folder(out, {**fields, **({"dtype": dtype} if architecture.model_type else {})}, theirs, vocabulary)
    return architecture, rules
