"""A prompt cache as a file: generation goes on from it later, in another process or on another machine.

A file is safetensors: the leaves of the state under their names ("state.0.memory"), the last tokens and the numbers of
tokens, and in the metadata which model it is of and a checksum. States that grow are as large as what was read.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ..mixers import ContractError
from ..mixers.state import from_dict, map_state, to_dict
from ..models import LanguageModel, PromptCache
from .checkpoint import CheckpointError, read_tensors, write_tensors
from .provenance import seqmix_version

FORMAT = "1"
FORMAT_KEY, MODEL_KEY, CHECKSUM_KEY = "seqmix.prompt_cache", "seqmix.model", "seqmix.sha256"
STATE, RECENT, LENGTHS = "state.", "recent", "lengths"


def save_prompt_cache(cache: PromptCache, model: LanguageModel, file: str | Path) -> None:
    """Write what a model has read; a file that is there is replaced when the new one is whole.

    Args:
        cache: from `cache_text`, `cache_tokens`, or the `on_end` of a generation.
        model: the model that has read it.
        file: where it goes.

    Raises:
        CheckpointError: it cannot be written.
    """
    file = Path(file)
    state = map_state(lambda leaf: leaf.detach().cpu(), cache.resized_state(model, None))
    tensors = {STATE + name: leaf for name, leaf in to_dict(state).items()}
    tensors |= {RECENT: cache.recent, LENGTHS: cache.lengths}
    metadata = {
        "format": "pt",
        "seqmix.version": seqmix_version(),
        FORMAT_KEY: FORMAT,
        MODEL_KEY: _digest(model.state_dict(), model.config.model_dump_json()),
        CHECKSUM_KEY: _digest(tensors),
    }
    write_tensors(file, tensors, metadata)


def load_prompt_cache(file: str | Path, model: LanguageModel) -> PromptCache:
    """What a model has read, from a file of `save_prompt_cache`, on the model's device.

    Raises:
        CheckpointError: the file is missing, damaged, something else, or of another model.
    """
    file = Path(file)
    tensors, metadata = read_tensors(file)
    if FORMAT_KEY not in metadata:
        raise CheckpointError(f"{file} holds no state of a text: it needs a file of `seqmix generate --save-state`")
    if metadata[FORMAT_KEY] != FORMAT:
        raise CheckpointError(
            f"{file} is of format {metadata[FORMAT_KEY]}, and this version of seqmix reads format {FORMAT}"
        )
    if metadata.get(CHECKSUM_KEY) != _digest(tensors):
        raise CheckpointError(f"{file} is damaged: its checksum is not the one it was written with")
    if metadata.get(MODEL_KEY) != _digest(model.state_dict(), model.config.model_dump_json()):
        raise CheckpointError(
            f"{file} is of another model: a state means something only to the weights and the configuration of its own"
        )
    try:
        recent, lengths = tensors.pop(RECENT), tensors.pop(LENGTHS)
        leaves = {name.removeprefix(STATE): leaf.to(model.device) for name, leaf in tensors.items()}
        state = from_dict(model.init_state(len(lengths)), leaves)
    except (KeyError, ContractError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    return PromptCache(state, recent, lengths)


def _digest(tensors: dict[str, Tensor], config: str = "") -> str:
    """A hash of names, types, shapes and values; with a configuration, what tells models apart."""
    found = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
