"""A prompt cache as a file: generation continues from it later, in another process or on another machine.

The file is safetensors: the leaves of the state under their names ("state.0.memory"), the last tokens and the token
counts, and in the metadata a checksum and a hash of the model. A growing state (KV cache) is as long as the prompt.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ...mixers import ContractError
from ...mixers.state import from_dict, map_state, to_dict
from ...models import LanguageModel, PromptCache
from ...models.prompt_cache import RECENT as RECENT_TOKENS
from ..tensor_files import CheckpointError, read_tensors, write_tensors
from .provenance import seqmix_version

FORMAT = "1"
FORMAT_KEY = "seqmix.prompt_cache"
MODEL_KEY = "seqmix.model"
CHECKSUM_KEY = "seqmix.sha256"
STATE = "state."
RECENT = "recent"
LENGTHS = "lengths"
COUNTS = ("position", "length")
"""Names of leaves that count tokens."""


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
    found, metadata = read_tensors([file])
    tensors = dict(found)
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
        recent = tensors.pop(RECENT)
        lengths = tensors.pop(LENGTHS)
        leaves = {name.removeprefix(STATE): leaf.to(model.device) for name, leaf in tensors.items()}
        _require_tokens(recent, lengths, model.config.vocab_size)
        _require_rows(leaves, len(lengths))
        state = from_dict(model.init_state(len(lengths)), leaves)
        _require_leaves(leaves, lengths - 1, model)
    except (KeyError, ContractError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    return PromptCache(state, recent, lengths)


def _require_tokens(recent: Tensor, lengths: Tensor, vocab_size: int) -> None:
    """Refuse what are not last tokens and token counts of texts: a checksum says nothing of who wrote them."""
    counts = lengths.dtype == torch.int64 and lengths.ndim == 1 and bool(((lengths > 0) & (lengths < 2**31)).all())
    if not counts or not len(lengths):
        raise ContractError("its lengths are not the token counts of texts")
    missing = (RECENT_TOKENS - lengths).clamp(min=0)
    if recent.dtype != torch.int64 or recent.shape != (len(lengths), RECENT_TOKENS):
        raise ContractError("its recent tokens have another shape or type than those of its texts")
    before = torch.arange(RECENT_TOKENS) < missing[:, None]
    if not torch.where(before, recent == -1, (recent >= 0) & (recent < vocab_size)).all():
        raise ContractError(f"its recent tokens are not tokens of this model, which are 0 to {vocab_size - 1}")


def _require_rows(leaves: dict[str, Tensor], rows: int) -> None:
    """Refuse leaves of other rows than texts, before a state of as many rows is allocated."""
    for name, leaf in leaves.items():
        if leaf.ndim == 0 or len(leaf) != rows:
            raise ContractError(f"its leaf {name} has shape {list(leaf.shape)}, for {rows} texts")


def _require_leaves(leaves: dict[str, Tensor], tokens: Tensor, model: LanguageModel) -> None:
    """Refuse leaves that no text leads to: of other types or shapes than the model's, NaN, or other token counts."""
    like, roomy = (to_dict(model.init_state(1, max_length=most)) for most in (None, 1))
    longest = int(tokens.max())
    for name, leaf in leaves.items():
        wanted = like[name]
        grown = roomy.get(name, like[name])
        # where an empty state has no room, and one for a token has it, the state grows with the text; one that does
        # not count its tokens leaves out those that change nothing
        counted = any(f"{name.rpartition('.')[0]}.{count}" in leaves for count in COUNTS)
        fits = leaf.ndim == wanted.ndim and all(
            (size == longest or (size < longest and not counted)) if own == 0 < more else size == own
            for size, own, more in zip(leaf.shape[1:], wanted.shape[1:], grown.shape[1:], strict=True)
        )
        if not fits or leaf.dtype != wanted.dtype:
            shape = ", ".join(["rows", *map(str, wanted.shape[1:])])
            raise ContractError(
                f"its leaf {name} is {leaf.dtype} {list(leaf.shape)}, and the model's is {wanted.dtype} [{shape}]"
            )
        if leaf.is_floating_point() and leaf.isnan().any():
            raise ContractError(f"its leaf {name} has values that are not numbers (NaN)")
        if name.rpartition(".")[2] in COUNTS and not torch.equal(leaf.cpu(), tokens):
            raise ContractError(f"its leaf {name} counts other tokens than the texts have")


def _digest(tensors: dict[str, Tensor], config: str = "") -> str:
    """A hash of names, types, shapes and values, and of a configuration."""
    found = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
