"""Prompt caches as files: generation continues from one later, in another process or on another machine.

The file is in safetensors format. It has the leaves of the state by name ("state.0.memory"), the last tokens and the
token counts; its metadata has a checksum and a hash of the model. A growing state (KV cache) is as long as the prompt.
"""

from pathlib import Path

import torch
from torch import Tensor

from ...mixers import ContractError
from ...mixers.base.state import from_dict, map_state, to_dict
from ...models import LanguageModel, PromptCache
from ...models.prompt_cache import RECENT as RECENT_TOKENS
from ..tensor_files import CHECKSUM_KEY, CheckpointError, checksum, read_tensors, write_tensors
from .provenance import seqmix_version

FORMAT = "1"
FORMAT_KEY = "seqmix.prompt_cache"
MODEL_KEY = "seqmix.model"
STATE = "state."
RECENT = "recent"
LENGTHS = "lengths"
COUNTS = ("position", "length")
"""Names of the leaves that hold token counts."""


def save_prompt_cache(cache: PromptCache, model: LanguageModel, file: str | Path) -> None:
    """Save a prompt cache; an existing file is replaced atomically.

    Args:
        cache: from `cache_text`, `cache_tokens`, or `on_end` of a generation.
        model: the model that processed the prompt.
        file: the path to write.

    Raises:
        CheckpointError: the file cannot be written.
    """
    file = Path(file)
    state = map_state(lambda leaf: leaf.detach().cpu(), cache.resized_state(model, None))
    tensors = {STATE + name: leaf for name, leaf in to_dict(state).items()}
    tensors |= {RECENT: cache.recent, LENGTHS: cache.lengths}
    metadata = {
        "format": "pt",
        "seqmix.version": seqmix_version(),
        FORMAT_KEY: FORMAT,
        MODEL_KEY: checksum(model.state_dict(), model.config.model_dump_json()),
        CHECKSUM_KEY: checksum(tensors),
    }
    write_tensors(file, tensors, metadata)


def load_prompt_cache(file: str | Path, model: LanguageModel) -> PromptCache:
    """Load a prompt cache from a file of `save_prompt_cache`, to the model's device.

    Args:
        file: the file.
        model: the model that processed the prompt.

    Raises:
        CheckpointError: the file is missing, damaged, of another format, or belongs to another model.
    """
    file = Path(file)
    loaded, metadata = read_tensors([file])
    tensors = dict(loaded)
    if FORMAT_KEY not in metadata:
        raise CheckpointError(f"{file} is not a prompt cache: `seqmix generate --save-state` writes one")
    if metadata[FORMAT_KEY] != FORMAT:
        raise CheckpointError(
            f"{file} is a prompt cache of format {metadata[FORMAT_KEY]}, expected format {FORMAT}: write it again with "
            "this version of seqmix"
        )
    if metadata.get(CHECKSUM_KEY) != checksum(tensors):
        raise CheckpointError(f"{file} is damaged: its checksum does not match")
    if metadata.get(MODEL_KEY) != checksum(model.state_dict(), model.config.model_dump_json()):
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
    """Check the last tokens and the token counts, as the file may be from somebody else.

    Raises:
        ContractError: they are invalid.
    """
    are_counts = lengths.dtype == torch.int64 and lengths.ndim == 1 and bool(((lengths > 0) & (lengths < 2**31)).all())
    if not are_counts or not len(lengths):
        raise ContractError("expected its lengths to be the token counts of one or more texts, each 1 to 2^31 - 1")
    n_padding = (RECENT_TOKENS - lengths).clamp(min=0)
    if recent.dtype != torch.int64 or recent.shape != (len(lengths), RECENT_TOKENS):
        raise ContractError(
            f"expected its recent tokens to be int64 [{len(lengths)}, {RECENT_TOKENS}], got {recent.dtype} "
            f"{list(recent.shape)}"
        )
    is_padding = torch.arange(RECENT_TOKENS) < n_padding[:, None]
    if not torch.where(is_padding, recent == -1, (recent >= 0) & (recent < vocab_size)).all():
        raise ContractError(f"expected its recent tokens to be 0 to {vocab_size - 1}, the vocabulary of the model")


def _require_rows(leaves: dict[str, Tensor], rows: int) -> None:
    """Check that each leaf has one row per text, before a state of as many rows is allocated.

    Raises:
        ContractError: a leaf has another number of rows.
    """
    for name, leaf in leaves.items():
        if leaf.ndim == 0 or len(leaf) != rows:
            raise ContractError(f"expected its leaf {name} to have {rows} rows, one per text, got {list(leaf.shape)}")


def _require_leaves(leaves: dict[str, Tensor], tokens: Tensor, model: LanguageModel) -> None:
    """Check the dtypes, shapes and token counts of a state against the model and the texts, and that it has no NaN.

    Args:
        leaves: the leaves of the state, by name.
        tokens: number of tokens that the state has processed, per text.
        model: the model.

    Raises:
        ContractError: a leaf is invalid.
    """
    # a dimension grows with the text if it is 0 in an empty state, and larger in a state with room for one token
    empty, with_room = (to_dict(model.init_state(1, max_length=length)) for length in (None, 1))
    longest = int(tokens.max())
    for name, leaf in leaves.items():
        expected = empty[name]
        leaf_with_room = with_room.get(name, expected)
        # a growing state that does not count its tokens may be shorter: it may omit tokens that change nothing
        has_count = any(f"{name.rpartition('.')[0]}.{count}" in leaves for count in COUNTS)
        sizes = zip(leaf.shape[1:], expected.shape[1:], leaf_with_room.shape[1:], strict=True)
        fits = leaf.ndim == expected.ndim and all(
            (size == longest or (size < longest and not has_count))
            if empty_size == 0 < size_with_room
            else size == empty_size
            for size, empty_size, size_with_room in sizes
        )
        if not fits or leaf.dtype != expected.dtype:
            shape = ", ".join(["rows", *map(str, expected.shape[1:])])
            raise ContractError(
                f"expected its leaf {name} to be {expected.dtype} [{shape}], got {leaf.dtype} {list(leaf.shape)}"
            )
        if leaf.is_floating_point() and leaf.isnan().any():
            raise ContractError(f"its leaf {name} has NaN values")
        if name.rpartition(".")[2] in COUNTS and not torch.equal(leaf.cpu(), tokens):
            raise ContractError(f"its leaf {name} does not match the token counts of the texts")
