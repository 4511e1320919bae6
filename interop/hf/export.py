"""Export of a run to a Hugging Face folder: config.json, model.safetensors and the tokenizer's files."""

from collections.abc import Callable
from pathlib import Path
from warnings import warn

from safetensors import SafetensorError

from ...registry import is_vacant, replacing_folder, write_files
from ...registry.deprecated import former_parameters
from ...training import Choice, load_run, read_config
from ...training.checkpoint.files import CheckpointError
from ...training.checkpoint.saved_run import load_checkpoint
from ...training.tensor_files import read_tensors, seal, write_tensors
from .card import card_of, training_of
from .modeling import SeqmixForCausalLM
from .remote_code import AUTO_MAP, code_of
from .tokenizer import hf_tokenizer


@former_parameters(tell="on_note")
def export_hf(
    run: str | Path,
    out: Path,
    *,
    choice: Choice = "newest",
    on_note: Callable[[str], object] = warn,
    ema: bool = False,
    trust: bool = False,
    remote_code: bool = False,
) -> None:
    """Write the trained model of a run for `AutoModelForCausalLM.from_pretrained` after `import seqmix.interop.hf`.

    The folder has a model card that says so, and how a run directory's model was trained.

    Args:
        run: run directory, or a file from `export_run`.
        out: output folder, new or empty.
        choice: the checkpoint to export, as in `load_run`.
        on_note: function that receives warnings, as in `load_run`.
        ema: True to export the averaged weights, as in `load_run`.
        trust: as in `load_run`.
        remote_code: True to write modeling code too, so that `trust_remote_code=True` replaces the import.

    Raises:
        SeqmixError: `run` is not a run, its mixers are plug-ins (with `remote_code`), or the folder is not empty or
            cannot be written.
    """
    if not is_vacant(out):
        raise CheckpointError(f"{out} exists and is not an empty folder: choose a new name")
    facts: dict[str, str] = {}
    if (folder := Path(run)).is_dir():
        config = read_config(folder, on_note=on_note, trust=trust)
        model, step = load_checkpoint(folder, config, "cpu", choice, on_note, ema)
        facts = training_of(folder, config, step, ema=ema)
    else:
        model = load_run(run, choice=choice, on_note=on_note, ema=ema, trust=trust)
    wrapped = SeqmixForCausalLM.wrap(model)
    if remote_code:
        wrapped.config.auto_map = AUTO_MAP
    blocks = model.config.model_dump(mode="json")["blocks"]
    texts = code_of(blocks) if remote_code else {}
    texts |= card_of(out.name, blocks, remote_code=remote_code, training=facts)
    files = [wrapped, *([] if model.tokenizer is None else [hf_tokenizer(model.tokenizer)])]
    try:
        with replacing_folder(out) as partial:
            for part in files:
                part.save_pretrained(partial)
            for file in partial.glob("*.safetensors"):
                tensors, metadata = read_tensors([file])
                write_tensors(file, tensors, seal(tensors, metadata))
            write_files({partial / name: text for name, text in texts.items()})
    except SafetensorError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error
