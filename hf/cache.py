"""The cache of Hugging Face's `generate`, whose layers hold states of mixers."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import GenerationMixin

from ..mixers import SequenceMixer
from ..mixers.state import select, to_dict
from ..mixers.traits import require_state
from ..registry import SeqmixError

NAME = "cache" if hasattr(GenerationMixin, "_prefill") else "past_key_values"
"""What this release of transformers calls the cache, in arguments and outputs."""


class StateLayer(CacheLayerMixin):
    """The state of one layer after all tokens so far.

    Args:
        max_length: the capacity in tokens, so that a KV cache is allocated once; more is allocated when needed.
    """

    is_sliding = False

    def __init__(self, max_length: int = 0) -> None:
        super().__init__()
        self.state: Any = None
        self.seen, self.capacity = 0, max_length

    def before(self, mixer: SequenceMixer[Any], rows: int, tokens: int) -> Any:
        """The state of so many rows before a segment, with room for its tokens.

        Raises:
            ContractError: the mixer has no state.
        """
        require_state(mixer.traits, mixer.kind)
        needed = self.seen + tokens
        if self.state is None:
            self.capacity = max(self.capacity, needed)
            self.state = mixer.init_state(rows, max_length=self.capacity)
        elif needed > self.capacity:
            self.capacity = needed + needed // 2  # a token is then copied a constant number of times on average
            self.state = mixer.resize_state(self.state, self.capacity)
        return self.state

    def after(self, state: Any, tokens: int) -> None:
        """Take the state after a segment."""
        self.state, self.seen = state, self.seen + tokens

    def get_seq_length(self, *_: Any) -> int:
        """Tokens so far, padding included."""
        return self.seen

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Length and offset of the keys, as if it were attention: what the masks of other layers are made for."""
        return self.seen + (query if isinstance(query, int) else len(query)), 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget all tokens."""
        self.state, self.seen = None, 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take rows by index, repeated if asked."""
        if self.state is not None:
            self.state = select(self.state, indices)

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            rows = len(next(iter(to_dict(self.state).values())))
            self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, *_: Any) -> None:
        """Refused."""
        raise SeqmixError("a recurrent state cannot take tokens back, as assisted decoding and crop() need")

    def update(self, *_: Any, **__: Any) -> Any:
        """Refused."""
        raise SeqmixError("this layer of the cache holds the state of a mixer, and was given keys and values")

    lazy_initialization = update


class SeqmixCache(Cache):
    """A cache for `SeqmixForCausalLM`: pass it from call to call, copy.deepcopy it to continue a prefix twice.

    Args:
        n_layers: layers of the model.
        max_length: as in `StateLayer`.
    """

    def __init__(self, n_layers: int, max_length: int = 0) -> None:
        super().__init__(layers=[StateLayer(max_length) for _ in range(n_layers)])


def the_cache(past_key_values: Any, cache: Any) -> SeqmixCache | None:
    """The cache of a call under either of its names.

    Raises:
        SeqmixError: both are given, or one of another kind.
    """
    if past_key_values is not None and cache is not None:
        raise SeqmixError("cache and past_key_values are two names of one argument, and both are given")
    given = cache if past_key_values is None else past_key_values
    if given is not None and not isinstance(given, SeqmixCache):
        raise SeqmixError(f"the cache of a seqmix model is a SeqmixCache, and a {type(given).__name__} was given")
    return given
