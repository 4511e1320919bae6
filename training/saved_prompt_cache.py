"""A prompt cache as a file: generation continues from it later, in another process or on another machine.

The file is safetensors: the leaves of the state under their names ("state.0.memory"), the last tokens and the token
counts, and in the metadata a checksum and a hash of the model. A growing state (KV cache) is as long as the prompt.
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
    """Save a prompt cache; an existing file is replaced atomically.

    Args:
        cache: from `cache_text`, `cache_tokens`, or `on_end` of a generation.
        model: the model that processed the prompt.
        file: the path to write.

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
    """Load a prompt cache from a file of `save_prompt_cache`, to the model's device.

    Raises:
        CheckpointError: the file is missing, damaged, of another format, or belongs to another model.
    """
    file = Path(file)
    tensors, metadata = read_tensors(file)
    if FORMAT_KEY not in metadata:
        raise CheckpointError(f"{file} is not a prompt cache: `seqmix generate --save-state` writes one")
    if metadata[FORMAT_KEY] != FORMAT:
        raise CheckpointError(
            f"{file} has format {metadata[FORMAT_KEY]}, and this version of seqmix reads format {FORMAT}"
        )
    if metadata.get(CHECKSUM_KEY) != _digest(tensors):
        raise CheckpointError(f"{file} is damaged: its checksum does not match")
    if metadata.get(MODEL_KEY) != _digest(model.state_dict(), model.config.model_dump_json()):
        raise CheckpointError(
            f"{file} belongs to another model: a prompt cache is valid only for the same weights and configuration"
        )
    try:
        recent, lengths = tensors.pop(RECENT), tensors.pop(LENGTHS)
        leaves = {name.removeprefix(STATE): leaf.to(model.device) for name, leaf in tensors.items()}
        state = from_dict(model.init_state(len(lengths)), leaves)
    except (KeyError, ContractError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    return PromptCache(state, recent, lengths)


def _digest(tensors: dict[str, Tensor], config: str = "") -> str:
    """A hash of names, types, shapes and values, and of a configuration."""
    found = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
